"""Writing the parts of a checkpoint as the single files that people have."""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from krea2_srt.model.dit_files import original_name

Edit = Callable[[dict[str, Tensor]], object]
"""Changes the tensors that are about to be written, in place."""

COMFY_DIT = "model.diffusion_model."

_RESIDUAL_LAYERS = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
"""Places of a residual block's layers in the original's row; SiLU and dropout are the others."""


def write_dit_file(folder: Path, file: Path, prefix: str = COMFY_DIT) -> Path:
    """A transformer with the original's names, as ComfyUI saves it.

    Args:
        folder: ``transformer/`` in the released layout.
        file: to write.
        prefix: put before every name.
    """
    tensors = {}
    for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        table = name.startswith("transformer_blocks.") and name.endswith("scale_shift_table")
        tensors[prefix + original_name(name)] = tensor.flatten() if table else tensor
    save_file(tensors, file)
    return file


def write_text_encoder_file(
    folder: Path,
    file: Path,
    *,
    text: str = "model.language_model.",
    vision: str | None = "model.visual.",
    config: bool = False,
    edit: Edit = lambda tensors: None,
) -> Path:
    """A text encoder, as ComfyUI's ``qwen3vl_4b_bf16.safetensors`` has it.

    Args:
        folder: ``text_encoder/`` in the released layout.
        file: to write.
        text, vision: put before the names of the text model and of the vision tower; the latter is
            left out if None.
        config: whether the folder's config is written into the metadata.
        edit: see `Edit`.
    """
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("language_model."):
            tensors[text + name.removeprefix("language_model.")] = tensor
        elif vision is not None:
            tensors[vision + name.removeprefix("visual.")] = tensor
    edit(tensors)
    save_file(tensors, file, metadata=_metadata(folder, config))
    return file


def write_vae_file(
    folder: Path,
    file: Path,
    *,
    native: bool = True,
    prefix: str = "",
    config: bool = False,
    edit: Edit = lambda tensors: None,
) -> Path:
    """A VAE, as ComfyUI's ``qwen_image_vae.safetensors`` and ``wan_2.1_vae.safetensors`` have it.

    Args:
        folder: ``vae/`` in the released layout.
        file: to write.
        native: whether it has the names of Wan 2.1 or those of Diffusers.
        prefix: put before every name.
        config: whether the folder's config is written into the metadata.
        edit: see `Edit`; before names get their prefix.
    """
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    if native:
        blocks = json.loads((folder / "config.json").read_text())["num_res_blocks"]
        tensors = {native_vae_name(name, blocks): tensor for name, tensor in tensors.items()}
    edit(tensors)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata=_metadata(folder, config))
    return file


def native_vae_name(name: str, num_res_blocks: int = 2) -> str:
    """The Wan 2.1 name of a VAE's tensor.

    Args:
        name: Diffusers'.
        num_res_blocks: of the config: a decoder's stage has one more.
    """
    if name.startswith("quant_conv."):
        return name.replace("quant_conv", "conv1")
    if name.startswith("post_quant_conv."):
        return name.replace("post_quant_conv", "conv2")
    half, rest = name.split(".", 1)
    per_stage = num_res_blocks + 2
    for pattern, native in (
        (r"conv_in\.(.+)", lambda m: f"conv1.{m[1]}"),
        (r"norm_out\.(.+)", lambda m: f"head.0.{m[1]}"),
        (r"conv_out\.(.+)", lambda m: f"head.2.{m[1]}"),
        (r"mid_block\.attentions\.0\.(.+)", lambda m: f"middle.1.{m[1]}"),
        (r"mid_block\.resnets\.(\d)\.(.+)", lambda m: f"middle.{2 * int(m[1])}.{_layer(m[2])}"),
        (r"down_blocks\.(\d+)\.(.+)", lambda m: f"downsamples.{m[1]}.{_layer(m[2])}"),
        (
            r"up_blocks\.(\d)\.resnets\.(\d)\.(.+)",
            lambda m: f"upsamples.{per_stage * int(m[1]) + int(m[2])}.{_layer(m[3])}",
        ),
        (
            r"up_blocks\.(\d)\.upsamplers\.0\.(.+)",
            lambda m: f"upsamples.{per_stage * (int(m[1]) + 1) - 1}.{m[2]}",
        ),
    ):
        if match := re.fullmatch(pattern, rest):
            return f"{half}.{native(match)}"
    raise AssertionError(f"{name} is none of a VAE's")


def with_damaged_headers(file: Path, times: int) -> Iterator[int]:
    """Turns one bit of a safetensors file's header, so many times; yields the byte's place.

    It may be in a name, a dtype, a shape, a place or the metadata.
    """
    chance = random.Random(0)
    with file.open("r+b") as opened:
        end = 8 + int.from_bytes(opened.read(8), "little")
        for _ in range(times):
            place = chance.randrange(8, end)
            opened.seek(place)
            (byte,) = opened.read(1)
            for value in (byte ^ 1 << chance.randrange(8), byte):
                opened.seek(place)
                opened.write(bytes([value]))
                opened.flush()
                if value != byte:
                    yield place


def _layer(name: str) -> str:
    module, leaf = name.split(".", 1)
    if module in _RESIDUAL_LAYERS:
        return f"residual.{_RESIDUAL_LAYERS[module]}.{leaf}"
    return name.replace("conv_shortcut.", "shortcut.")


def _metadata(folder: Path, config: bool) -> Mapping[str, Any]:
    stated = {"config": (folder / "config.json").read_text()} if config else {}
    return {"format": "pt", **stated}
