"""RMSNorm over the channels of each pixel, and the SiLU behind it, with channels innermost.

y = x / max(|x|, 1e-12) * sqrt(C) * gamma          in float32, |x| over the C channels
y * sigmoid(y)                                     where there is a SiLU
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of

_ELEMENTS = 4096
"""Elements of a program."""


def channel_norm(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """Normalise each pixel.

    Args:
        x: [n, C, height, width].
        gamma: [C, 1, 1].
        silu: whether a SiLU follows.

    Returns:
        Like x.
    """
    scale = gamma.float() * x.shape[1] ** 0.5
    out = F.normalize(x.float(), dim=1).mul_(scale).to(x.dtype)
    return F.silu(out, inplace=True) if silu else out


@triton.jit(do_not_specialize=["num_pixels"])
def _channel_norm_kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    num_pixels,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    mask = (pixel < num_pixels)[:, None] & inside[None, :]
    at = pixel[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + channel, inside, 0.0).to(tl.float32)
    root: tl.constexpr = CHANNELS**0.5
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    y = x * (root / norm)[:, None] * gamma[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)


def channel_norm_triton(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """See `channel_norm`; x has its channels innermost in memory."""
    count, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(channels)
    pixels = max(1, _ELEMENTS // block)
    num_pixels = count * height * width
    launch, _ = device_of(x.device).launch("channel_norm", num_pixels)
    _channel_norm_kernel[(triton.cdiv(num_pixels, pixels),)](
        x,
        gamma,
        out,
        num_pixels,
        CHANNELS=channels,
        BLOCK=block,
        PIXELS=pixels,
        SILU=silu,
        num_warps=launch.num_warps,
    )
    return out
