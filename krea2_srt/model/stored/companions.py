"""What lies beside quantised matrices in a file: scales and markers, each put to its matrix."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from krea2_srt.errors import CheckpointError
from krea2_srt.model.stored.formats import FP8, INSTEAD, PLAIN, SMALL_FLOATS
from krea2_srt.model.stored.markers import Marker, parse_marker
from krea2_srt.model.stored.plain import PlainTensor
from krea2_srt.model.stored.prefixes import unprefixed
from krea2_srt.model.stored.scaled import ScaledTensor
from krea2_srt.model.stored.tensor import StoredTensor

METADATA = "_quantization_metadata"
"""Where a file's header has the markers of its matrices."""

_SCALES = ("weight_scale", "scale_weight")
_INPUT_SCALES = ("input_scale", "scale_input")
_MARKER = "comfy_quant"
_FILE_MARKER = "scaled_fp8"
_MARKER_BYTES = 2**16


@dataclass(frozen=True)
class Joined:
    """What tensors of some files mean together.

    Attributes:
        tensors: weights with their scales and markers, and all others, by their names.
        notes: what a user should know of them, for the log.
    """

    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = ()


def join(found: Mapping[str, PlainTensor], metadata: Mapping[Path, Mapping[str, str]]) -> Joined:
    """Put scales and markers to the weights beside which they lie.

    Only they are read, which are small.

    Args:
        found: all tensors of the files, by name.
        metadata: what each file's header says.

    Raises:
        CheckpointError: one is missing, has no weight, or does not fit it, or a weight is in a
            format that is not read.
    """
    companions = _Companions(found)
    markers = _header_markers(found, metadata)
    tensors: dict[str, StoredTensor] = {}
    notes: Counter[str] = Counter()
    for key, tensor in found.items():
        if companions.has(key):
            continue
        stem = key.removesuffix(".weight") if key.endswith(".weight") else None
        scale, marker = None, None
        if stem is not None:
            scale = companions.take(stem, _SCALES)
            marker = _marker(companions.take(stem, (_MARKER,)), markers.pop(stem, None), tensor)
            input_scale = companions.take(stem, _INPUT_SCALES)
            if input_scale is not None:
                _check_input_scale(input_scale, scale)
                notes["scales of activations are not used, tokens are quantised by their own"] += 1
            if marker is not None and marker.full_precision:
                notes["matrices are marked full_precision_matrix_mult"] += 1
        tensors[key] = _joined(tensor, scale, marker, companions.scaled)
    if alone := companions.left():
        raise alone.wrong("belongs to a weight that is not there")
    return Joined(tensors, tuple(f"{count} {text}" for text, count in notes.items()))


class _Companions:
    """Scales and markers, by the stem of the weight that they belong to."""

    def __init__(self, found: Mapping[str, PlainTensor]) -> None:
        self._left: dict[str, PlainTensor] = {}
        self._all: set[str] = set()
        self.scaled = False
        for key, tensor in found.items():
            stem, _, last = key.rpartition(".")
            if last == _FILE_MARKER:
                if tensor.kind not in (*FP8, *PLAIN) or tensor.shape not in ((0,), (1,), (2,), ()):
                    raise tensor.wrong(f"is {tensor.kind} {list(tensor.shape)}, {_not_understood}")
                self._all.add(key)
                self.scaled = True
            elif stem and last in (*_SCALES, *_INPUT_SCALES, _MARKER):
                self._all.add(key)
                self._left[key] = tensor
                self.scaled |= last in _SCALES

    def has(self, key: str) -> bool:
        """Whether a tensor is one of them."""
        return key in self._all

    def take(self, stem: str, names: Sequence[str]) -> PlainTensor | None:
        """The one of some names that a weight has."""
        some = [t for name in names if (t := self._left.pop(f"{stem}.{name}", None)) is not None]
        if len(some) > 1:
            raise some[1].wrong(f"and {some[0].key} are scales of the same weight")
        return some[0] if some else None

    def left(self) -> PlainTensor | None:
        """One that nobody has taken."""
        return next(iter(self._left.values()), None)


_not_understood = f"which is not understood; {INSTEAD}"


def _joined(
    tensor: PlainTensor, scale: PlainTensor | None, marker: Marker | None, scaled: bool
) -> StoredTensor:
    """A weight with its scale and its marker.

    Args:
        tensor: the weight.
        scale: its scale, if there is one.
        marker: what is said of it.
        scaled: whether the files have scales at all: then no matrix in 8 bits is without.
    """
    kind = tensor.kind
    if kind not in (*PLAIN, *FP8, "I8"):
        whose = f", which is {SMALL_FLOATS[kind]}" if kind in SMALL_FLOATS else ""
        raise tensor.wrong(f"is stored as {kind}{whose}; {INSTEAD}")
    if not all(tensor.shape):
        raise tensor.wrong(f"has shape {list(tensor.shape)}, so there is nothing in it")
    if marker is not None:
        if marker.kind != kind:
            raise tensor.wrong(f"is stored as {kind}, its marker says {marker.kind}")
        if marker.original_shape not in (None, tensor.shape):
            shape = list(marker.original_shape or ())
            raise tensor.wrong(f"has shape {list(tensor.shape)}, its marker says {shape}")
    if kind in PLAIN:
        if scale is not None:
            raise tensor.wrong(f"is stored as {kind} and has a scale, {scale.key}")
        return tensor
    if scale is None:
        if kind == "I8" or marker is not None or (scaled and len(tensor.shape) > 1):
            raise tensor.wrong(f"is stored as {kind} and has no scale (weight_scale)")
        return tensor
    if kind == "I8" and marker is None:
        raise tensor.wrong(f"has no marker that says whether it is rotated ({_MARKER})")
    if len(tensor.shape) < 2 or (kind == "I8" and len(tensor.shape) > 2):
        raise tensor.wrong(f"has shape {list(tensor.shape)} and a scale, {scale.key}")
    rotation = 0 if marker is None else marker.rotation
    if rotation and tensor.shape[1] % rotation:
        raise tensor.wrong(f"has {tensor.shape[1]} columns, its marker says groups of {rotation}")
    return ScaledTensor(tensor, _scale(scale, tensor), rotation)


def _scale(scale: PlainTensor, weight: PlainTensor) -> Tensor:
    """float32 [1] or [out]."""
    out = weight.shape[0]
    if scale.kind not in PLAIN:
        name = "mxfp8" if scale.kind in ("U8", "F8_E8M0") else "a format of smaller blocks"
        raise scale.wrong(f"is stored as {scale.kind}, as scales of {name} are; {INSTEAD}")
    if scale.shape not in ((), (1,), (1, 1), (out,), (out, 1)):
        raise scale.wrong(
            f"has shape {list(scale.shape)}; the scale of {weight.key} must be one number or "
            f"have the shape [{out}, 1]"
        )
    found = scale.read().float().flatten()
    if not bool((found.isfinite() & (found > 0)).all()):
        raise scale.wrong("must be positive and finite")
    return found


def _check_input_scale(scale: PlainTensor, weight_scale: PlainTensor | None) -> None:
    if weight_scale is None:
        raise scale.wrong("belongs to a weight that has no scale")
    if scale.kind not in PLAIN or scale.shape not in ((), (1,), (1, 1)):
        raise scale.wrong(f"is {scale.kind} {list(scale.shape)}, it must be one number")
    value = scale.read().float()
    if not bool((value.isfinite() & (value > 0)).all()):
        raise scale.wrong("must be positive and finite")


def _marker(
    stored: PlainTensor | None, header: Marker | None, weight: PlainTensor
) -> Marker | None:
    """What is said of a weight, in a tensor and in the header."""
    if stored is None:
        return header
    if stored.kind != "U8" or len(stored.shape) != 1 or stored.shape[0] > _MARKER_BYTES:
        raise stored.wrong(f"is {stored.kind} {list(stored.shape)}, it must be the bytes of a JSON")
    try:
        said = json.loads(bytes(stored.read().tolist()))
    except (ValueError, RecursionError):
        raise stored.wrong("is no JSON") from None
    try:
        marker = parse_marker(said)
    except CheckpointError as error:
        raise stored.wrong(str(error)) from None
    if header not in (None, marker):
        raise weight.wrong(f"has a marker, {stored.key}, and the header's {METADATA} says another")
    return marker


def _header_markers(
    found: Mapping[str, PlainTensor], metadata: Mapping[Path, Mapping[str, str]]
) -> dict[str, Marker]:
    """Markers of the files' headers, by the stem of their weight."""
    texts = {file: said[METADATA] for file, said in metadata.items() if METADATA in said}
    if not texts:
        return {}
    stems = {k.removesuffix(".weight") for k in found if k.endswith(".weight")}
    # Some tools leave out the prefix that the tensors have.
    bare = {unprefixed(stem): stem for stem in stems}
    markers: dict[str, Marker] = {}
    for file, text in texts.items():
        where = f"weight file {file}: {METADATA} in its header"
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{where} is no JSON") from None
        layers = said.get("layers") if isinstance(said, dict) else None
        if not isinstance(layers, dict):
            raise CheckpointError(f"{where} has no layers; {INSTEAD}")
        for layer, one in layers.items():
            stem = layer if layer in stems else bare.get(layer)
            if stem is None:
                raise CheckpointError(f"{where} names {layer!r}, which has no weight")
            try:
                marker = parse_marker(one)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {layer!r} {error}") from None
            if markers.setdefault(stem, marker) != marker:
                raise CheckpointError(f"{where} says another of {layer!r} than another file")
    return markers
