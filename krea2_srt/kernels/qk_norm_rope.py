"""RMSNorm and rotary embedding of queries and keys, in place on the fused projection.

    y = x / sqrt(mean(x^2) + eps) * scale              per head, in float32
    (y[2i], y[2i+1]) <- (y[2i] cos - y[2i+1] sin, y[2i] sin + y[2i+1] cos)

The projection's columns are queries, keys, values and output gates; only the first two change.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of


def qk_norm_rope(
    projection: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    rope: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> None:
    """Normalise and rotate in place.

    Args:
        projection: [T, width], queries [heads * head_dim] and keys [kv_heads * head_dim] first.
        q_scale, k_scale: float32 [head_dim], of the norms.
        rope: complex64 [T, head_dim / 2]; None rotates nothing.
        heads, kv_heads: of queries and of keys.
        eps: of the norms.
    """
    head_dim = len(q_scale)
    start = 0
    for scale, count in ((q_scale, heads), (k_scale, kv_heads)):
        part = projection[:, start : start + count * head_dim].unflatten(-1, (count, head_dim))
        x = F.rms_norm(part.float(), (head_dim,), scale, eps)
        if rope is not None:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            x = torch.view_as_real(pairs * rope[:, None]).flatten(-2)
        part.copy_(x)
        start += count * head_dim


@triton.jit
def _qk_norm_rope_kernel(
    projection_ptr,
    q_scale_ptr,
    k_scale_ptr,
    rope_ptr,
    stride,
    eps,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    mask = (head < ALL_HEADS) & (column < HEAD_DIM)
    at = projection_ptr + token * stride + head * HEAD_DIM + column
    x = tl.load(at, mask, 0.0).to(tl.float32)
    scale = tl.where(head < HEADS, tl.load(q_scale_ptr + column), tl.load(k_scale_ptr + column))
    x = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / HEAD_DIM + eps) * scale
    if ROPE:
        half = tl.arange(0, HEAD_DIM)
        rotation = tl.load(rope_ptr + token * HEAD_DIM + half)
        cos, sin = tl.split(tl.reshape(rotation, (HEAD_DIM // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (HEAD_BLOCK, HEAD_DIM // 2, 2)))
        cos, sin = cos[None, :], sin[None, :]
        pair = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(pair, (HEAD_BLOCK, HEAD_DIM))
    tl.store(at, x.to(projection_ptr.dtype.element_ty), mask)


def qk_norm_rope_triton(
    projection: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    rope: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> None:
    """See `qk_norm_rope`; head_dim must be a power of two."""
    launch, _ = device_of(projection.device).launch("qk_norm_rope", len(projection))
    _qk_norm_rope_kernel[(len(projection),)](
        projection,
        q_scale,
        k_scale,
        projection if rope is None else torch.view_as_real(rope),
        projection.stride(0),
        eps,
        HEADS=heads,
        ALL_HEADS=heads + kv_heads,
        HEAD_DIM=len(q_scale),
        HEAD_BLOCK=triton.next_power_of_2(heads + kv_heads),
        ROPE=rope is not None,
        num_warps=launch.num_warps,
    )
