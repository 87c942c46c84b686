"""Loading the DiT, with the names of either release.

(a) Diffusers layout: a folder with ``config.json`` and (sharded) safetensors.
(b) A single file: the original (``oss_turbo`` / ``oss_raw``), whose tensors have other names, or
    one made of it, in any of the formats and with any of the prefixes of `krea2_srt.model.stored`.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from krea2_srt.errors import AdapterError, CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.config import CLASS_NAME, Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.json_files import parse_json, read_json
from krea2_srt.model.matrices import matrices_of
from krea2_srt.model.part_files import CONFIG
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.prefixes import check_no_prefix, without_prefix
from krea2_srt.model.stored.tensor import StoredTensor, renamed, shapes_of
from krea2_srt.model.weights import (
    WeightDelta,
    WeightSlot,
    check_weights,
    checkpoint_files,
    load_weights,
)

logger = logging.getLogger(__name__)

_DIFFUSERS_BLOCKS = "transformer_blocks."
_ORIGINAL_BLOCKS = "blocks."
_TENSORS_OF_A_BLOCK = 10
"""At least."""

# Fragments of tensor names, original | Diffusers. Each maps one name to one name both ways.
_NAMES: tuple[tuple[str, str], ...] = (
    ("first.", "img_in."),
    ("blocks.", "transformer_blocks."),
    ("txtfusion.", "text_fusion."),
    ("tmlp.0.", "time_embed.linear_1."),
    ("tmlp.2.", "time_embed.linear_2."),
    ("tproj.1.", "time_mod_proj."),
    ("txtmlp.0.", "txt_in.norm."),
    ("txtmlp.1.", "txt_in.linear_1."),
    ("txtmlp.3.", "txt_in.linear_2."),
    ("last.modulation.lin", "final_layer.scale_shift_table"),
    ("last.", "final_layer."),
)
_INNER_NAMES: tuple[tuple[str, str], ...] = (
    (".mod.lin", ".scale_shift_table"),
    (".prenorm.", ".norm1."),
    (".postnorm.", ".norm2."),
    (".attn.wq.", ".attn.to_q."),
    (".attn.wk.", ".attn.to_k."),
    (".attn.wv.", ".attn.to_v."),
    (".attn.wo.", ".attn.to_out.0."),
    (".attn.gate.", ".attn.to_gate."),
    (".qknorm.qnorm.", ".norm_q."),
    (".qknorm.knorm.", ".norm_k."),
    (".mlp.", ".ff."),
)


def diffusers_name(original: str) -> str:
    """The Diffusers name of a tensor of the original single-file checkpoint."""
    name = original
    if name.endswith(".scale"):
        name = name.removesuffix(".scale") + ".weight"
    return _translate(name, _NAMES, _INNER_NAMES)


def original_name(diffusers: str) -> str:
    """The original name of a tensor of a Diffusers-layout checkpoint."""
    name = _translate(
        diffusers,
        tuple((theirs, ours) for ours, theirs in _NAMES),
        tuple((theirs, ours) for ours, theirs in _INNER_NAMES),
    )
    # Norms call their weight "scale"; matrices do not.
    owner = name.removesuffix(".weight")
    if owner != name and (owner.endswith("norm") or owner == "txtmlp.0"):
        return f"{owner}.scale"
    return name


def original_shape(diffusers: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the original release has a tensor: blocks' tables are flat there."""
    flat = diffusers.startswith(_DIFFUSERS_BLOCKS) and diffusers.endswith(".scale_shift_table")
    return (math.prod(shape),) if flat else shape


def _translate(
    name: str, prefixes: tuple[tuple[str, str], ...], inner: tuple[tuple[str, str], ...]
) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inner:
        name = name.replace(old, new)
    return name


def load_dit(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    deltas: Mapping[str, WeightDelta] = MappingProxyType({}),
    on_host: Collection[int] = (),
) -> Krea2DiT:
    """Load a DiT straight onto its device.

    Args:
        path: a ``transformer/`` folder in Diffusers layout, or a single file.
        device: where the weights go.
        dtype: compute dtype; norms and modulation tables stay float32.
        quantization: of the blocks' matrices, each quantised as it is read.
        deltas: what is added to matrices before that, by their Diffusers names; see
            `krea2_srt.lora.merge`.
        on_host: numbers of blocks whose matrices go to host memory instead, the same to the bit:
            one after another passes the device, where they are quantised.

    Raises:
        CheckpointError: missing or damaged files, or tensors that do not fit the config.
        ConfigError: the quantization does not fit the model, or host memory cannot be pinned.
        AdapterError: the deltas are another model's.
    """
    with open_dit(path) as opened:
        _check_deltas(deltas, opened.tensors)
        dit = _empty(opened.config, device, dtype, quantization, opened.rotations, on_host)
        loaded = load_weights(opened.tensors, dit.weight_map(), deltas, device)
    line = loaded.line(path, opened.notes, advise=quantization is None)
    if line is not None:
        logger.info("%s", line)
    return dit


@dataclass(frozen=True)
class StoredDiT:
    """A DiT's files, open; nothing of the weights is read yet.

    Attributes:
        files: where its tensors lie.
        config: its sizes.
        tensors: by Diffusers name; just those that a DiT of this config has.
        plan: a DiT of this config, without memory for its weights.
        notes: see `krea2_srt.model.stored.files.StoredFiles`.
    """

    files: tuple[Path, ...]
    config: Krea2Config
    tensors: Mapping[str, StoredTensor]
    plan: Krea2DiT
    notes: Sequence[str]

    @property
    def rotations(self) -> dict[str, int]:
        """How int8 matrices are rotated, by the DiT's name of them, where all their parts that are
        in int8 agree.
        """
        found: dict[str, set[int]] = {}
        for name, matrix in matrices_of(self.plan).items():
            format = self.tensors[f"{name}.weight"].eight_bit
            if format is not None and format.dtype is torch.int8:
                found.setdefault(matrix.linear, set()).add(format.rotation)
        return {linear: min(some) for linear, some in found.items() if len(some) == 1}

    def eight_bit_formats(self, quantization: Quantization) -> dict[str, TokenFormat]:
        """What a DiT that is loaded with a quantization has each matrix in that is quantised, by
        Diffusers name.
        """
        meta = torch.device("meta")  # takes no memory
        dit = _empty(self.config, meta, torch.bfloat16, quantization, self.rotations)
        slots = dit.weight_map().items()
        return {name: slot.eight_bit for name, slot in slots if slot.eight_bit is not None}


@contextmanager
def open_dit(path: Path) -> Iterator[StoredDiT]:
    """Open a DiT's files, and check names and shapes.

    Args:
        path: see `load_dit`.

    Raises:
        CheckpointError: see `load_dit`.
    """
    files = checkpoint_files(path, WEIGHTS["transformer"])
    with open_files(files) as opened:
        stored = _by_diffusers_name(opened.tensors, path)
        config = _config(path, stored, opened.metadata)
        plan = _empty(config, torch.device("meta"), torch.bfloat16)  # takes no memory
        check_weights(
            plan.weight_map(),
            shapes_of(stored),
            path,
            written=lambda name: stored[name].key if name in stored else name,
        )
        yield StoredDiT(tuple(files), config, stored, plan, opened.notes)


def dit_config(path: Path) -> Krea2Config:
    """The config of what `load_dit` loads.

    Raises:
        CheckpointError: see `load_dit`.
    """
    if path.is_dir():
        return read_config(path)
    with open_files([path]) as opened:
        return _config(path, _by_diffusers_name(opened.tensors, path), opened.metadata)


def read_config(folder: Path) -> Krea2Config:
    """Read ``transformer/config.json``."""
    return parse_json(folder / "config.json", Krea2Config.from_dict)


def _config(
    path: Path, stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Krea2Config:
    """A folder's own, or what a single file says of itself, or what lies beside it, or what its
    tensors speak of.
    """
    if path.is_dir():
        return read_config(path)
    try:
        told = json.loads(metadata.get(CONFIG, "null"))
    except (ValueError, RecursionError):
        told = None
    beside = path.with_name("config.json")
    try:
        # Other tools use the key for configs of their own, and folders have other models' too.
        if _is_config(told):
            config = Krea2Config.from_dict(told)
        elif beside.is_file() and _is_config(read_json(beside)):
            config = parse_json(beside, Krea2Config.from_dict)
        else:
            config = Krea2Config.from_shapes(shapes_of(stored))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.num_layers > len(stored) // _TENSORS_OF_A_BLOCK:
        raise CheckpointError(f"{path}: {config.num_layers} blocks, but {len(stored)} tensors only")
    return config


def _is_config(values: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(values, dict) and values.get("_class_name") == CLASS_NAME


def _by_diffusers_name(tensors: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    bare = without_prefix(tensors)
    check_no_prefix(bare, where)
    theirs = next((name for name in bare if name.startswith(_DIFFUSERS_BLOCKS)), None)
    original = next((name for name in bare if name.startswith(_ORIGINAL_BLOCKS)), None)
    if theirs is not None and original is not None:
        raise CheckpointError(
            f"{where}: {bare[original].key} is a name of the original layout and "
            f"{bare[theirs].key} one of Diffusers'; a file has one of them"
        )
    if theirs is not None:
        return bare
    tables = {
        name: _Table(tensor) if name.endswith(".mod.lin") and len(tensor.shape) == 1 else tensor
        for name, tensor in bare.items()
    }
    return renamed(tables, diffusers_name, where)


class _Table:
    """A block's modulation table: the original stores it flat, [6 * hidden]; same order."""

    def __init__(self, flat: StoredTensor) -> None:
        self._flat = flat
        self.key, self.kind, self.extent = flat.key, flat.kind, flat.extent
        self.eight_bit = None
        (size,) = flat.shape
        self.shape = (6, size // 6) if size % 6 == 0 else flat.shape

    def read(self) -> Tensor:
        return self._flat.read().reshape(self.shape)

    def read_eight_bit(self) -> QuantizedTokens:
        raise TypeError(f"{self.key} is no matrix")


def _check_deltas(deltas: Mapping[str, WeightDelta], tensors: Mapping[str, StoredTensor]) -> None:
    if other := sorted(deltas.keys() - tensors.keys()):
        raise AdapterError(f"the model has no {other[0]} that a merged adapter changes")


def _meta_weight_map(config: Krea2Config) -> dict[str, WeightSlot]:
    """What a DiT of this config needs, found without taking memory for it."""
    return _empty(config, torch.device("meta"), torch.bfloat16).weight_map()


def _empty(
    config: Krea2Config,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    rotations: Mapping[str, int] = MappingProxyType({}),
    on_host: Collection[int] = (),
) -> Krea2DiT:
    with torch.device(device):
        return Krea2DiT(config, dtype, quantization, rotations, on_host).eval()


def stored_shapes(config: Krea2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Diffusers-layout checkpoint with this config."""
    return {name: slot.stored_shape for name, slot in _meta_weight_map(config).items()}


def config_dict(config: Krea2Config) -> dict[str, object]:
    """The config as plain JSON values, with Diffusers' names."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
