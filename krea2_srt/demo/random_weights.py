"""Random weights that make an untrained network show what tests must see.

Prompt, seed and number of steps each change the picture, which has structure and contrast
(tests/torch/cli/test_demo_model.py).
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class RandomWeights:
    """All weights from a seed.

    Args:
        seed: of them.
    """

    vae_config: Mapping[str, Any] = {}
    trained_side = 2048  # as Krea 2: they are as random at every size
    loras: Sequence[Path] = ()

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def transformer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return _dit_tensor(name, shape, self._seed)

    def text_encoder(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return _encoder_tensor(name, shape, self._seed)

    def vae(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return _vae_tensor(name, shape, self._seed)


def normal(name: str, shape: Iterable[int], seed: int, std: float) -> Tensor:
    """Seeded by name, so that no tensor depends on the order in which a library lists them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return (torch.randn(tuple(shape), generator=generator) * std).to(torch.bfloat16)


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape[1:]))


def _dit_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    block = name.startswith("transformer_blocks.")
    if name == "final_layer.linear.weight":
        return _final_weight(name, shape, seed)
    if name == "time_embed.linear_1.weight":
        return _time_weight(name, shape, seed)
    if "scale_shift_table" in name:
        return normal(name, shape, seed, 0.3)
    if block and "attn.norm" in name:
        # Queries and keys longer than usual: attention prefers few tokens, and which ones
        # changes with the position, so the prompt's tokens draw patterns.
        return (normal(name, shape, seed, 0.1).float() + 0.75).to(torch.bfloat16)
    if "norm" in name:
        return normal(name, shape, seed, 0.1)
    if name == "img_in.bias":
        return normal(name, shape, seed, 1.0)  # what all image tokens have in common
    if name == "txt_in.linear_2.bias":
        return torch.zeros(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return normal(name, shape, seed, 0.1)
    gain = 3.0 if block and ("to_v" in name or "to_out" in name) else 1.0
    return normal(name, shape, seed, gain * _fan_in(shape) ** -0.5)


def time_shares(sinusoids: int) -> Tensor:
    """How much each of the time's sinusoids counts: fast ones less, as in a trained network.

    Without it the rounding of the timestep to bf16, which Diffusers does and SGLang does not, would
    give other pictures.
    """
    half = sinusoids // 2
    radians_per_unit_time = 1e3 * torch.exp(-math.log(1e4) * torch.arange(half) / half)
    share = (20.0 / radians_per_unit_time).clamp(max=1.0).repeat(2)
    share /= share.square().mean().sqrt()
    return share


def _time_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    weight = normal(name, shape, seed, _fan_in(shape) ** -0.5).float() * time_shares(shape[1])
    return weight.to(torch.bfloat16)


def _final_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Mostly the same for the four latents of a patch, so that structure is wider than one patch,
    plus the inverse of the input projection, so that the velocity points away from the noise.
    """
    std = 1.5 * _fan_in(shape) ** -0.5
    patches = normal(f"{name}/patch", (shape[0] // 4, shape[1]), seed, std).float()
    detail = normal(name, shape, seed, 0.3 * std).float()
    img_in = _dit_tensor("img_in.weight", (shape[1], shape[0]), seed).float()
    weight = patches.repeat_interleave(4, 0) + detail + 3.0 * torch.linalg.pinv(img_in)
    return weight.to(torch.bfloat16)


def _encoder_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return (1 + normal(name, shape, seed, 0.1).float()).to(torch.bfloat16)
    if "embed" in name:
        return normal(name, shape, seed, 1.0)
    return normal(name, shape, seed, _fan_in(shape) ** -0.5)


def _vae_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("gamma"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return normal(name, shape, seed, 0.05)
    # Causal 3-D kernels see one frame: only their last temporal slice counts as fan-in.
    fan_in = _fan_in(shape) // (shape[2] if len(shape) == 5 else 1)
    gain = 0.45 if name == "decoder.conv_out.weight" else 1.0
    return normal(name, shape, seed, gain * fan_in**-0.5)
