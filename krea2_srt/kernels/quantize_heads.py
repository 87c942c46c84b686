"""Per-head dynamic quantisation of a pack's queries, keys and values, for attention in fp8.

    scale  = max |x| / 448       of a segment's tokens and one key/value head, or the queries' group
    values = round(x / scale)    in e4m3

A scale is its own segment's alone: who shares a pack does not change a picture.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.quantize import LARGEST, SMALLEST

E4M3 = torch.float8_e4m3fn

TOKENS, WARPS = 16, 4
"""Tokens and warps of a program. Nothing is summed, so that another number gives the same values.
"""


@dataclass(frozen=True)
class QuantizedHeads:
    """Elements of a head are ``values * scale``.

    Attributes:
        values: e4m3 [T, heads, head_dim], contiguous.
        scale: float32 [S, kv_heads], of each segment; what FlashAttention calls descale.
    """

    values: Tensor
    scale: Tensor


QuantizedQkv = tuple[QuantizedHeads, QuantizedHeads, QuantizedHeads]


def quantize_qkv(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> QuantizedQkv:
    """Quantise a pack's queries, keys and values. Reads nothing on the host.

    Args:
        q: [T, heads, head_dim]; its tokens may lie apart.
        k, v: [T, kv_heads, head_dim], likewise; heads is a multiple of kv_heads.
        cu_seqlens: int32 [S + 1]; the segments cover all T tokens.
    """
    segment = _segment_of(cu_seqlens, len(q))
    numbers = torch.arange(len(cu_seqlens) - 1, device=q.device)
    inside = (numbers[:, None] == segment)[:, :, None]

    def quantized(x: Tensor) -> QuantizedHeads:
        grouped = x.unflatten(1, (k.shape[1], -1))
        largest = torch.linalg.vector_norm(grouped, math.inf, dim=(2, 3), dtype=torch.float32)
        # By a mask and not by scatter_reduce, whose atomics all meet at one segment's address.
        scale = torch.where(inside, largest, 0.0).amax(1).clamp_(min=SMALLEST) / LARGEST[E4M3]
        values = grouped.float() * (1 / scale)[segment][:, :, None, None]
        values = values.clamp_(-LARGEST[E4M3], LARGEST[E4M3]).to(E4M3)
        return QuantizedHeads(values.flatten(1, 2), scale)

    return quantized(q), quantized(k), quantized(v)


def _segment_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 [T], each token's segment."""
    positions = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, out_int32=True, right=True)


@triton.jit
def _load_heads(x_ptr, stride, at, head, inside, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """A key/value head of some tokens, or a group of heads of the queries; zeros beyond them."""
    columns = tl.arange(0, PADDED)
    places = x_ptr + at.to(tl.int64)[:, None] * stride + head * COLUMNS + columns[None, :]
    mask = inside[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(places, mask, 0.0).to(tl.float32), columns, mask


# Not specialised: a new number of tokens must not compile a new kernel while requests wait.
@triton.jit(do_not_specialize=["tokens"])
def _largest_kernel(
    x_ptr,
    segment_ptr,
    largest_ptr,
    stride,
    tokens,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    at = start + tl.arange(0, TOKENS)
    inside = at < tokens
    x, _, _ = _load_heads(x_ptr, stride, at, head, inside, COLUMNS, PADDED)
    largest = tl.max(tl.abs(x), 1)
    first = tl.load(segment_ptr + start)
    if first == tl.load(segment_ptr + tl.minimum(start + TOKENS, tokens) - 1):
        tl.atomic_max(largest_ptr + first * KV_HEADS + head, tl.max(largest, 0))
    else:
        segment = tl.load(segment_ptr + at, inside, 0)
        tl.atomic_max(largest_ptr + segment * KV_HEADS + head, largest, inside)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_kernel(
    x_ptr,
    segment_ptr,
    scale_ptr,
    out_ptr,
    stride,
    tokens,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    at = start + tl.arange(0, TOKENS)
    inside = at < tokens
    x, columns, mask = _load_heads(x_ptr, stride, at, head, inside, COLUMNS, PADDED)
    segment = tl.load(segment_ptr + at, inside, 0)
    scale = tl.load(scale_ptr + segment * KV_HEADS + head, inside, 1.0)
    x = x * (1.0 / scale)[:, None]
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    row = at.to(tl.int64)[:, None] * (KV_HEADS * COLUMNS)
    places = out_ptr + row + head * COLUMNS + columns[None, :]
    tl.store(places, x.to(out_ptr.dtype.element_ty), mask)


def quantize_qkv_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> QuantizedQkv:
    """See `quantize_qkv`."""
    tokens, kv_heads, segments = len(q), k.shape[1], len(cu_seqlens) - 1
    segment = _segment_of(cu_seqlens, tokens)
    scales = torch.zeros(3, segments, kv_heads, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(tokens, TOKENS), kv_heads)

    def launch(kernel: triton.JITFunction, x: Tensor, *pointers: Tensor) -> None:
        columns = x.shape[1] // kv_heads * x.shape[2]
        assert x.stride(2) == 1
        assert x.stride(1) == x.shape[2]
        kernel[grid](
            x,
            segment,
            *pointers,
            x.stride(0),
            tokens,
            KV_HEADS=kv_heads,
            COLUMNS=columns,
            PADDED=triton.next_power_of_2(columns),
            TOKENS=TOKENS,
            num_warps=WARPS,
        )

    for x, scale in zip((q, k, v), scales, strict=True):
        launch(_largest_kernel, x, scale)
    scales.clamp_(min=SMALLEST).div_(LARGEST[E4M3])

    def quantized(x: Tensor, scale: Tensor) -> QuantizedHeads:
        values = x.new_empty(x.shape, dtype=E4M3)
        launch(_quantize_kernel, x, scale, values)
        return QuantizedHeads(values, scale)

    return quantized(q, scales[0]), quantized(k, scales[1]), quantized(v, scales[2])
