"""Loading the DiT from either released format.

(a) Diffusers layout: a folder with ``config.json`` and (sharded) safetensors.
(b) The original single file (``oss_turbo`` / ``oss_raw``), whose tensors have other names.
"""

import dataclasses
import re
from pathlib import Path

import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.weights import (
    Target,
    check_weights,
    checkpoint_files,
    load_weights,
    read_json,
    tensor_shapes,
)

_STEM = "diffusion_pytorch_model"

# Original name -> Diffusers name, applied in order.
_ORIGINAL_NAMES: tuple[tuple[str, str], ...] = (
    (r"^first\.", "img_in."),
    (r"^blocks\.", "transformer_blocks."),
    (r"^txtfusion\.", "text_fusion."),
    (r"^tmlp\.0\.", "time_embed.linear_1."),
    (r"^tmlp\.2\.", "time_embed.linear_2."),
    (r"^tproj\.1\.", "time_mod_proj."),
    (r"^txtmlp\.0\.", "txt_in.norm."),
    (r"^txtmlp\.1\.", "txt_in.linear_1."),
    (r"^txtmlp\.3\.", "txt_in.linear_2."),
    (r"^last\.modulation\.lin$", "final_layer.scale_shift_table"),
    (r"^last\.", "final_layer."),
    (r"\.mod\.lin$", ".scale_shift_table"),
    (r"\.prenorm\.", ".norm1."),
    (r"\.postnorm\.", ".norm2."),
    (r"\.attn\.w([qkv])\.", r".attn.to_\1."),
    (r"\.attn\.wo\.", ".attn.to_out.0."),
    (r"\.attn\.gate\.", ".attn.to_gate."),
    (r"\.qknorm\.([qk])norm\.", r".norm_\1."),
    (r"\.mlp\.", ".ff."),
    (r"\.scale$", ".weight"),
)


def diffusers_name(original: str) -> str:
    """The Diffusers name of a tensor of the original single-file checkpoint."""
    name = original
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_dit(path: Path, device: torch.device, dtype: torch.dtype) -> Krea2DiT:
    """Load a DiT straight onto its device.

    Args:
        path: a ``transformer/`` folder in Diffusers layout, or an original ``.safetensors`` file.
        device: where the weights go.
        dtype: compute dtype; norms and modulation tables stay float32.

    Raises:
        CheckpointError: missing or damaged files, or tensors that do not fit the config.
    """
    return _load_original(path, device, dtype) if path.is_file() else _load_folder(path, device, dtype)


def read_config(folder: Path) -> Krea2Config:
    """Read ``transformer/config.json``."""
    try:
        return Krea2Config.from_dict(read_json(folder / "config.json"))
    except CheckpointError as error:
        prefix = "" if str(folder) in str(error) else f"{folder / 'config.json'}: "
        raise CheckpointError(f"{prefix}{error}") from None


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Krea2DiT:
    config = read_config(folder)
    files = checkpoint_files(folder, _STEM)
    shapes = tensor_shapes(files)
    _check(config, dtype, shapes, folder)
    dit = _empty(config, device, dtype)
    load_weights(files, dit.targets())
    return dit


def _load_original(file: Path, device: torch.device, dtype: torch.dtype) -> Krea2DiT:
    stored = tensor_shapes([file])
    shapes = {diffusers_name(name): _table_shape(name, shape) for name, shape in stored.items()}
    try:
        config = Krea2Config.from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    _check(config, dtype, shapes, file)
    dit = _empty(config, device, dtype)
    load_weights([file], dit.targets(), rename=diffusers_name)
    return dit


def _table_shape(original: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # Blocks store their table flat, [6 * hidden]; Diffusers as [6, hidden]. Same order.
    if original.endswith(".mod.lin") and len(shape) == 1 and shape[0] % 6 == 0:
        return (6, shape[0] // 6)
    return shape


def _check(
    config: Krea2Config, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], where: Path
) -> None:
    # On the meta device, so that a wrong config is reported before memory is taken for it.
    check_weights(_empty(config, torch.device("meta"), dtype).targets(), shapes, where)


def _empty(config: Krea2Config, device: torch.device, dtype: torch.dtype) -> Krea2DiT:
    with torch.device(device):
        return Krea2DiT(config, dtype).eval()


def stored_shapes(config: Krea2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Diffusers-layout checkpoint with this config."""
    meta = _empty(config, torch.device("meta"), torch.bfloat16)
    return {name: target.stored_shape for name, target in meta.targets().items()}


def config_dict(config: Krea2Config) -> dict[str, object]:
    """The config as plain JSON values, with Diffusers' names."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }


__all__ = [
    "Target",
    "config_dict",
    "diffusers_name",
    "load_dit",
    "read_config",
    "stored_shapes",
]
