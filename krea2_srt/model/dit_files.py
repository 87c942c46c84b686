"""Loading the DiT from either released format.

(a) Diffusers layout: a folder with ``config.json`` and (sharded) safetensors.
(b) The original single file (``oss_turbo`` / ``oss_raw``), whose tensors have other names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from krea2_srt.errors import AdapterError, CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.json_files import parse_json
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.prefixes import without_prefix
from krea2_srt.model.stored.tensor import StoredTensor, renamed, shapes_of
from krea2_srt.model.weights import (
    WeightDelta,
    WeightSlot,
    check_weights,
    checkpoint_files,
    load_weights,
)

_STEM = "diffusion_pytorch_model"
_DIFFUSERS_BLOCKS = "transformer_blocks."

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
) -> Krea2DiT:
    """Load a DiT straight onto its device.

    Args:
        path: a ``transformer/`` folder in Diffusers layout, or a single file.
        device: where the weights go.
        dtype: compute dtype; norms and modulation tables stay float32.
        quantization: of the blocks' matrices, each quantised as it is read.
        deltas: what is added to matrices before that, by their Diffusers names; see
            `krea2_srt.lora.merge`.

    Raises:
        CheckpointError: missing or damaged files, or tensors that do not fit the config.
        ConfigError: the quantization does not fit the model.
        AdapterError: the deltas are another model's.
    """
    files = [path] if path.is_file() else checkpoint_files(path, _STEM)
    with open_files(files) as opened:
        stored = _by_diffusers_name(opened.tensors, path)
        config = _config(path, stored)
        needed = _meta_weight_map(config, dtype)
        check_weights(needed, shapes_of(stored), path)
        _check_deltas(deltas, needed)
        dit = _empty(config, device, dtype, quantization)
        load_weights(stored, dit.weight_map(), deltas)
    return dit


def dit_config(path: Path) -> Krea2Config:
    """The config of what `load_dit` loads.

    Raises:
        CheckpointError: see `load_dit`.
    """
    if path.is_dir():
        return read_config(path)
    with open_files([path]) as opened:
        return _config(path, _by_diffusers_name(opened.tensors, path))


def read_config(folder: Path) -> Krea2Config:
    """Read ``transformer/config.json``."""
    return parse_json(folder / "config.json", Krea2Config.from_dict)


def _config(path: Path, stored: Mapping[str, StoredTensor]) -> Krea2Config:
    """A folder's own, or that which a single file's tensors speak of."""
    if path.is_dir():
        return read_config(path)
    try:
        return Krea2Config.from_shapes(shapes_of(stored))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _by_diffusers_name(tensors: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    bare = without_prefix(tensors)
    if any(name.startswith(_DIFFUSERS_BLOCKS) for name in bare):
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
        self.key, self.kind, self.eight_bit = flat.key, flat.kind, None
        (size,) = flat.shape
        self.shape = (6, size // 6) if size % 6 == 0 else flat.shape

    def read(self) -> Tensor:
        return self._flat.read().reshape(self.shape)

    def read_eight_bit(self) -> QuantizedTokens:
        raise TypeError(f"{self.key} is no matrix")


def _check_deltas(deltas: Mapping[str, WeightDelta], needed: Mapping[str, WeightSlot]) -> None:
    if other := sorted(deltas.keys() - needed.keys()):
        raise AdapterError(f"the model has no {other[0]} that a merged adapter changes")


def _meta_weight_map(config: Krea2Config, dtype: torch.dtype) -> dict[str, WeightSlot]:
    """What a DiT of this config needs, found without taking memory for it."""
    return _empty(config, torch.device("meta"), dtype).weight_map()


def _empty(
    config: Krea2Config,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> Krea2DiT:
    with torch.device(device):
        return Krea2DiT(config, dtype, quantization).eval()


def stored_shapes(config: Krea2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Diffusers-layout checkpoint with this config."""
    needed = _meta_weight_map(config, torch.bfloat16)
    return {name: slot.stored_shape for name, slot in needed.items()}


def config_dict(config: Krea2Config) -> dict[str, object]:
    """The config as plain JSON values, with Diffusers' names."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
