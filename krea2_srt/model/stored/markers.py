"""What ComfyUI's files say of a quantised matrix, in JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shortened

import torch

from krea2_srt.errors import CheckpointError, ConfigError
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.model.stored.formats import INSTEAD

FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
"""Formats that are read, and how safetensors calls their values."""

GROUPS = (4, 16, 64, 256, 1024)
"""How many columns can be rotated together: powers of 4, as the rotation is one of 4x4."""

_DEFAULT_GROUP = 256
"""ComfyUI's, where a marker says none."""

_KNOWN = {
    "format",
    "full_precision_matrix_mult",
    "convrot",
    "convrot_groupsize",
    "orig_shape",
    # What the tensors themselves say, or nothing that a reader needs.
    "orig_dtype",
    "per_row",
}


@dataclass(frozen=True)
class Marker:
    """How a matrix is stored.

    Attributes:
        kind: safetensors' name of its values.
        rotation: how many columns are rotated together; 0 for no rotation.
        full_precision: its maker wants its products in full precision.
        original_shape: its shape before it was quantised, where that is said.
    """

    kind: str
    rotation: int = 0
    full_precision: bool = False
    original_shape: tuple[int, ...] | None = None


def parse_marker(said: object) -> Marker:
    """Read a marker's JSON.

    Raises:
        CheckpointError: it is not understood; the message says what, and wants the place put
            before it.
    """
    if isinstance(said, str):  # some tools write the format alone
        said = {"format": said}
    if not isinstance(said, dict):
        raise CheckpointError(f"is {shortened(said)}, it must be a JSON object")
    values = {key: value for key, value in said.items() if value is not None}
    inner = values.pop("params", {})
    if not isinstance(inner, dict):
        raise CheckpointError(f"has params {shortened(inner)}, they must be a JSON object")
    values = inner | values
    format = values.get("format")
    if not isinstance(format, str) or format not in FORMATS:
        raise CheckpointError(f"says the format {shortened(format)}, which is not read; {INSTEAD}")
    if unknown := sorted(values.keys() - _KNOWN):
        raise CheckpointError(f"says {shortened(unknown[0])}, which is not understood")
    shape = values.get("orig_shape")
    if shape is not None and not (
        isinstance(shape, list) and all(type(size) is int for size in shape)
    ):
        raise CheckpointError(f"says orig_shape {shortened(shape)}, it must be a list of numbers")
    return Marker(
        FORMATS[format],
        _rotation(values, format),
        _flag(values, "full_precision_matrix_mult"),
        None if shape is None else tuple(shape),
    )


def marker_of(format: TokenFormat) -> dict[str, object]:
    """The JSON of a marker of what products are made of; `parse_marker` reads it.

    Raises:
        ConfigError: there is no marker for it.
    """
    if format.dtype is torch.float8_e4m3fn:
        if format.rotation:
            raise ConfigError("quantization: no file has fp8 that is rotated; use int8 or fp8")
        return {"format": "float8_e4m3fn"}
    said: dict[str, object] = {"format": "int8_tensorwise"}
    if format.rotation:
        said |= {"convrot": True, "convrot_groupsize": format.rotation}
    return said


def _rotation(values: Mapping[str, object], format: str) -> int:
    if not _flag(values, "convrot"):
        return 0
    if FORMATS[format] != "I8":
        raise CheckpointError(f"says that {format} is rotated, which is not read; {INSTEAD}")
    group = values.get("convrot_groupsize", _DEFAULT_GROUP)
    if type(group) is not int or group not in GROUPS:
        known = ", ".join(map(str, GROUPS))
        raise CheckpointError(f"says convrot_groupsize {shortened(group)}, not one of {known}")
    return group


def _flag(values: Mapping[str, object], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"says {name} {shortened(value)}, it must be true or false")
    return value
