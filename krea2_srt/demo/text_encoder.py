"""The demo's text encoder: nothing in it is learned, all of it follows from a seed.

A Qwen3-VL of 36 narrow layers that does just what a small grammar needs: a token's states keep the
token and mix in those right before it, so that in "a red circle on blue" the circle knows its red.
Random weights alone would mix in all earlier tokens alike.

One channel of the residual stream is the same for all tokens at all layers. Queries and keys are
made mostly of it, so what RoPE leaves of their product depends on the distance of two tokens only,
and each head's is largest at a distance of its own.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

HEAD_DIM = 64
ROPE_THETA = 5_000_000

CONSTANT = 8.0
"""Value of channel 0 of the residual stream; others start with a deviation of 1."""

DISTANCES = (1, 2)
"""To the token that each head looks at."""

_PAIRS = 6
"""Pairs of a head's channels that carry the distance: the fastest."""

_SHARPNESS = 2.0
_QUERY_GAIN = 4.0
_BRANCH_GAIN = 0.3
"""Gain of what a layer adds: the token itself remains to the last selected layer."""

Normal = Callable[[str, tuple[int, ...], float], Tensor]
"""Random numbers of a deviation, by the tensor's name."""


def encoder_tensor(name: str, shape: tuple[int, ...], normal: Normal) -> Tensor:
    """A tensor of the text model, float32, by its name in the checkpoint."""
    if name.endswith("q_norm.weight"):
        return torch.full(shape, _SHARPNESS)
    if len(shape) == 1:
        return torch.ones(shape)
    if "embed_tokens" in name:
        weight = normal(name, shape, 1.0)
        weight[:, 0] = CONSTANT
        return weight
    weight = normal(name, shape, shape[1] ** -0.5)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        weight *= _BRANCH_GAIN
        weight[0] = 0.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight *= 0.5
        heads = shape[0] // HEAD_DIM
        distances = DISTANCES[:heads] if name.endswith("q_proj.weight") else (0,)
        at = [_looking_back(distance) for distance in distances]
        weight[:, 0] += _QUERY_GAIN * torch.cat(at)
    return weight


def _looking_back(distance: int) -> Tensor:
    """A query of length 1 whose product with that of distance 0 is largest so far back."""
    half = HEAD_DIM // 2
    angles = distance * ROPE_THETA ** (-torch.arange(half) / half)
    used = (torch.arange(half) < _PAIRS) / math.sqrt(_PAIRS)
    return torch.cat([angles.cos() * used, -angles.sin() * used])
