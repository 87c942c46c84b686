"""Names of a VAE's tensors: Diffusers' and those of the original Wan 2.1, which ComfyUI keeps.

Both hold the same tensors in the same shapes. The original counts the blocks of a decoder's stages
and the upsamplers between them in one row; Diffusers gives each stage rows of its own.
"""

import re
from collections.abc import Collection, Mapping

# Whole beginnings of names, original | Diffusers.
_PARTS = (
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
)
_HALVES = ("encoder.", "decoder.")
_HALF_PARTS = (
    ("conv1.", "conv_in."),
    ("middle.0.", "mid_block.resnets.0."),
    ("middle.1.", "mid_block.attentions.0."),
    ("middle.2.", "mid_block.resnets.1."),
    ("downsamples.", "down_blocks."),
    ("head.0.", "norm_out."),
    ("head.2.", "conv_out."),
)
# Inside a residual block, of which the original is a row of layers and a shortcut.
_BLOCK_PARTS = (
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
)
_IN_ROW = re.compile(r"decoder\.upsamples\.([0-9]{1,3})\.(.+)", re.DOTALL)
"""A place in the original's row of a decoder's blocks, and what is there."""


def stage_length(names: Collection[str]) -> int:
    """Places that a stage has in the original's row: its residual blocks and its upsampler.

    Args:
        names: of all tensors; of those that are not the original's, the answer means nothing.
    """
    found = (_IN_ROW.fullmatch(name) for name in names)
    return 1 + min((int(m[1]) for m in found if m and m[2].startswith("resample.")), default=0)


def diffusers_name(name: str, length: int) -> str:
    """The Diffusers name of a tensor; one that is not the original's is returned as it is.

    Args:
        name: of a tensor, without prefixes.
        length: see `stage_length`.
    """
    for original, ours in _PARTS:
        if name.startswith(original):
            return ours + name.removeprefix(original)
    half = next((half for half in _HALVES if name.startswith(half)), None)
    if half is None:
        return name
    for original, ours in _HALF_PARTS:
        if name.startswith(half + original):
            name = half + ours + name.removeprefix(half + original)
            break
    if match := _IN_ROW.fullmatch(name):
        stage, place = divmod(int(match[1]), length)
        at = "upsamplers.0" if place == length - 1 else f"resnets.{place}"
        name = f"decoder.up_blocks.{stage}.{at}.{match[2]}"
    for original, ours in _BLOCK_PARTS:
        name = name.replace(original, ours)
    return name


def other_vae(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a VAE is that Krea 2 cannot use, where its tensors tell.

    Args:
        shapes: by Diffusers name, or by names that are of another VAE.
    """
    first = shapes.get("decoder.conv_in.weight", ())
    channels = first[1] if len(first) > 1 else 0
    if channels == 48 or any(".upsamples." in name for name in shapes):
        return "a Wan 2.2 VAE of 48 latent channels"
    if len(first) == 4 and not any(name.endswith(".gamma") for name in shapes):
        return f"an AutoencoderKL of {channels} latent channels, as those of SDXL and FLUX are"
    outputs = next(iter(shapes.get("decoder.conv_out.weight", ())), 3)
    if outputs == 4:
        return "an RGBA VAE, as Qwen-Image-Layered's is"
    if outputs != 3:
        return f"a VAE that gives {outputs} channels instead of 3"
    if any("transformer_blocks." in name or "txtfusion." in name for name in shapes):
        return "a diffusion transformer"
    if any(".self_attn.q_proj." in name for name in shapes):
        return "a language model"
    return None
