"""The final layer: norm, scale and shift of each token, then a narrow matrix multiplication.

    h = x / sqrt(mean(x^2) + eps) * scale[row] + shift[row]
    velocity = h W^T + bias

In one kernel, since 6144 columns go in and only 64 come out.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of
from krea2_srt.kernels.norm import norm_scale_shift
from krea2_srt.kernels.segment_index import SegmentIndex

_COLUMNS = 128
"""Columns of x that a program reads at a time."""


def final_layer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Velocity of every token.

    Args:
        x: [T, width], contiguous.
        scale, shift: float32 [rows, width].
        rows: which of them each token reads.
        eps: of the norm.
        weight, bias: [channels, width] and [channels], in x's dtype.

    Returns:
        [T, channels] in x's dtype; of text tokens too, where it means nothing.
    """
    h = norm_scale_shift(x, scale, shift, rows, eps)
    assert isinstance(h, Tensor)
    return F.linear(h, weight, bias)


@triton.jit(do_not_specialize=["num_tokens"])
def _final_layer_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    row_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    row = tl.load(row_ptr + token, live, 0)
    x_at = x_ptr + token.to(tl.int64)[:, None] * WIDTH
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = live[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_at + column[None, :], mask, 0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    inverse = tl.rsqrt(squares / WIDTH + eps)
    channel = tl.arange(0, CHANNELS)
    found = tl.zeros((TOKENS, CHANNELS), tl.float32)
    # The second look at x finds it in the L2 cache.
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        mask = live[:, None] & inside[None, :]
        x = tl.load(x_at + column[None, :], mask, 0.0).to(tl.float32)
        scale = tl.load(scale_ptr + (row * scale_stride)[:, None] + column[None, :], mask, 0.0)
        shift = tl.load(shift_ptr + (row * shift_stride)[:, None] + column[None, :], mask, 0.0)
        h = (x * inverse[:, None] * scale + shift).to(weight_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + channel[None, :] * WIDTH + column[:, None], inside[:, None], 0.0
        )
        found = tl.dot(h, weight, found, input_precision="ieee")
    found += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * CHANNELS + channel[None, :],
        found.to(out_ptr.dtype.element_ty),
        live[:, None],
    )


def final_layer_triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """See `final_layer`; channels must be a power of two, at least 16."""
    num_tokens, width = x.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    launch, _ = device_of(x.device).launch("final_layer", num_tokens)
    out = torch.empty(num_tokens, len(weight), dtype=x.dtype, device=x.device)
    _final_layer_kernel[(triton.cdiv(num_tokens, launch.tokens),)](
        x,
        scale,
        shift,
        rows.index,
        weight,
        bias,
        out,
        num_tokens,
        scale.stride(0),
        shift.stride(0),
        eps,
        WIDTH=width,
        CHANNELS=len(weight),
        TOKENS=launch.tokens,
        COLUMNS=_COLUMNS,
        num_warps=launch.num_warps,
    )
    return out
