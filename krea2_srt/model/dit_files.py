"""Loading the DiT from either released format.

(a) Diffusers layout: a folder with ``config.json`` and (sharded) safetensors.
(b) The original single file (``oss_turbo`` / ``oss_raw``), whose tensors have other names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from krea2_srt.errors import AdapterError, CheckpointError
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.weights import (
    WeightDelta,
    WeightSlot,
    check_weights,
    checkpoint_files,
    load_weights,
    parse_json,
    tensor_shapes,
)

_STEM = "diffusion_pytorch_model"

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
        path: a ``transformer/`` folder in Diffusers layout, or an original ``.safetensors`` file.
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
    load = _load_original if path.is_file() else _load_folder
    return load(path, device, dtype, quantization, deltas)


def dit_config(path: Path) -> Krea2Config:
    """The config of what `load_dit` loads.

    Raises:
        CheckpointError: see `load_dit`.
    """
    return _original_config(path)[0] if path.is_file() else read_config(path)


def read_config(folder: Path) -> Krea2Config:
    """Read ``transformer/config.json``."""
    return parse_json(folder / "config.json", Krea2Config.from_dict)


def _load_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None,
    deltas: Mapping[str, WeightDelta],
) -> Krea2DiT:
    config = read_config(folder)
    files = checkpoint_files(folder, _STEM)
    needed = _meta_weight_map(config, dtype)
    check_weights(needed, tensor_shapes(files), folder)
    _check_deltas(deltas, needed)
    dit = _empty(config, device, dtype, quantization)
    load_weights(files, dit.weight_map(), deltas=deltas)
    return dit


def _load_original(
    file: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None,
    deltas: Mapping[str, WeightDelta],
) -> Krea2DiT:
    config, shapes = _original_config(file)
    needed = _meta_weight_map(config, dtype)
    check_weights(needed, shapes, file)
    _check_deltas(deltas, needed)
    dit = _empty(config, device, dtype, quantization)
    load_weights([file], dit.weight_map(), diffusers_name, deltas)
    return dit


def _check_deltas(deltas: Mapping[str, WeightDelta], needed: Mapping[str, WeightSlot]) -> None:
    if other := sorted(deltas.keys() - needed.keys()):
        raise AdapterError(f"the model has no {other[0]} that a merged adapter changes")


def _original_config(file: Path) -> tuple[Krea2Config, dict[str, tuple[int, ...]]]:
    """The config that a single file's tensors speak of, and their shapes by Diffusers name."""
    stored = tensor_shapes([file])
    shapes = {diffusers_name(name): _table_shape(name, shape) for name, shape in stored.items()}
    try:
        return Krea2Config.from_shapes(shapes), shapes
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _table_shape(original: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # Blocks store their table flat, [6 * hidden]; Diffusers as [6, hidden]. Same order.
    if original.endswith(".mod.lin") and len(shape) == 1 and shape[0] % 6 == 0:
        return (6, shape[0] // 6)
    return shape


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
