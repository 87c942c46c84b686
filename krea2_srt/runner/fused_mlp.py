"""From how many tokens on the MLP's first product ends in SwiGLU, by trial and by the clock."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from krea2_srt.errors import ConfigError, first_line
from krea2_srt.kernels.operations import Operations
from krea2_srt.kernels.quantize import quantize_tokens
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.layers import SwiGLU
from krea2_srt.runner.attention import Timer, cuda_milliseconds
from krea2_srt.runner.race import TOLERANCE, Race

logger = logging.getLogger(__name__)

TOKENS = (320, 1088, 4160)
"""Tokens of the packs that are timed: one image of 256x256, 512x512 and 1024x1024."""

_TRIAL_TOKENS = 1037
"""An odd number of nine tiles, so that there are full ones, a last one, and more than one group."""

_QUANTIZED_TOLERANCE = 6e-2
"""Where both ways quantise what they have rounded differently, some elements fall on the other
side: 0.027 at most by emulation.
"""


def check_fused_mlp(setting: str, operations: Operations) -> None:
    """Check that the setting can be had.

    Raises:
        ConfigError: it cannot.
    """
    if setting == "on" and operations.name != "triton":
        raise ConfigError("fused_mlp: on needs Triton's kernels, which are not in use here")


def with_fused_mlp(dit: Krea2DiT, setting: str, timer: Timer = cuda_milliseconds) -> Operations:
    """The model's operations, with `Operations.fused_mlp_tokens` as it is best.

    Args:
        dit: the model, on its device.
        setting: ``on``, ``off``, or ``auto``, which tries and times an MLP of the model either way.
        timer: see `Race`.

    Raises:
        ConfigError: it is asked for, and is wrong or does not run on this device.
    """
    race = Race(timer)
    apart = replace(dit.operations, fused_mlp_tokens=math.inf)
    fused = replace(dit.operations, fused_mlp_tokens=0)
    if setting == "off" or dit.operations.name != "triton":
        return apart
    # Those of streamed blocks are on the host while their block does not run.
    device = dit.img_in.weight.device
    here = [block.ff for block in dit.blocks if block.ff.gate_up.weight.device == device]
    # What holds of one in 8 bits holds of those that stay as they are, but not the other way round.
    here = [mlp for mlp in here if mlp.down.format is not None] or here
    mlp = here[len(here) // 2]
    expected = _call(mlp, apart, _TRIAL_TOKENS)()
    tolerance = TOLERANCE if mlp.down.format is None else _QUANTIZED_TOLERANCE
    if fault := race.fault(_call(mlp, fused, _TRIAL_TOKENS), expected, tolerance):
        if setting == "on":
            raise ConfigError(f"fused_mlp: it fails on this device: {fault}")
        logger.info("krea2-srt: the fused MLP is passed over: %s", fault)
        return apart
    if setting == "on":
        return fused
    try:
        times = {
            name: [race.ms(_call(mlp, operations, tokens)) for tokens in TOKENS]
            for name, operations in (("fused", fused), ("apart", apart))
        }
    except Exception as error:  # it does few tokens and not many, or memory ran out
        logger.info("krea2-srt: the fused MLP is passed over: %s", first_line(error))
        return apart
    first = first_fused(times["fused"], times["apart"])
    if mlp.down.format is not None and first > 0:
        # In 8 bits the two ways differ by more than rounding: a picture must not depend on how
        # large its pack is.
        first = math.inf
    logger.info(
        "krea2-srt: MLP fused %s; ms of one at %s tokens: %s",
        "never" if first == math.inf else f"from {first:g} tokens on",
        ", ".join(map(str, TOKENS)),
        "; ".join(f"{name} {', '.join(f'{ms:.3g}' for ms in row)}" for name, row in times.items()),
    )
    return replace(dit.operations, fused_mlp_tokens=first)


def first_fused(fused: Sequence[float], apart: Sequence[float]) -> float:
    """Fewest tokens from which on fused is faster at every size: 0 where it always is, infinity
    where it is not at the largest.
    """
    first = math.inf
    for tokens, ours, theirs in sorted(zip(TOKENS, fused, apart, strict=True), reverse=True):
        if ours >= theirs:
            return first
        first = tokens
    return 0


def _call(mlp: SwiGLU, operations: Operations, tokens: int) -> Callable[[], Tensor]:
    linear = mlp.gate_up
    device = linear.weight.device
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(tokens, linear.weight.shape[1], generator=generator, device=device)
    x = noise.to(linear.dtype)
    inputs = x if linear.format is None else quantize_tokens(x, linear.format)
    return torch.inference_mode()(lambda: mlp(inputs, operations))
