"""Attention within each segment, its output gated where it is written.

    out = softmax(q k^T / sqrt(head_dim)) v * sigmoid(gate)

The softmax is computed online, in float32 and in powers of two. Offsets of the segments are read on
the device alone, so that a CUDA graph of the kernel serves other segments.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.gates import sigmoid_gate

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionTiles:
    """How attention is cut among programs.

    Attributes:
        queries: of a program, for one head.
        keys: that it looks at at a time.
        num_warps: of a program.
        num_stages: loads of keys and values under way.
    """

    queries: int = 128
    keys: int = 32
    num_warps: int = 8
    num_stages: int = 3


SMALL = AttentionTiles()
"""64 KiB of shared memory and 187 registers; with more keys at a time they spill."""

LARGE = AttentionTiles(keys=128, num_stages=2)
"""160 KiB. Their tensor cores read keys and values from there, not from registers."""

TILES = {(9, 0): LARGE, (10, 0): LARGE, (10, 3): LARGE}
"""By compute capability; `SMALL` elsewhere."""


@cache
def tiles_of(device: torch.device) -> AttentionTiles:
    """Those of a device."""
    if device.type != "cuda":  # the interpreter
        return SMALL
    return TILES.get(torch.cuda.get_device_capability(device), SMALL)


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor
) -> Tensor:
    """Attend, bidirectionally, within each segment.

    Args:
        q: [T, heads, head_dim]; tokens may lie apart, the heads of one do not.
        k, v: [T, kv_heads, head_dim], likewise; heads is a multiple of kv_heads.
        gate: [T, heads * head_dim], likewise; None for no gate.
        cu_seqlens: int32 [S + 1], offsets of the segments, which together are all T tokens.

    Returns:
        [T, heads, head_dim] in q's dtype, contiguous.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grouped = q.shape[1] > k.shape[1]
    for start, end in pairwise(cu_seqlens.tolist()):
        q_, k_, v_ = (x[start:end].transpose(0, 1) for x in (q, k, v))
        segment = F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped)
        out[start:end] = segment.transpose(0, 1)
    if gate is None:
        return out
    gated = sigmoid_gate(out.flatten(1), gate)
    assert isinstance(gated, Tensor)
    return gated.view(q.shape)


@triton.jit
def _attend(q, k_ptr, v_ptr, at, keys, length, acc, largest, total, scale, MASKED: tl.constexpr):
    """A block of keys and values. MASKED: those from length on are beyond the segment."""
    if MASKED:
        live = keys < length
        k = tl.load(k_ptr + at, live[:, None], 0.0)
        v = tl.load(v_ptr + at, live[:, None], 0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(live[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_largest, total


# Not specialised: a new number of segments must not compile a new kernel while requests wait.
@triton.jit(do_not_specialize=["num_segments"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gate_ptr,
    out_ptr,
    cu_seqlens_ptr,
    num_segments,
    q_stride,
    kv_stride,
    gate_stride,
    out_stride,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The query heads of a key/value head run side by side, and find its keys in the L2 cache.
    tile = tl.program_id(0) // GROUP
    kv_head = tl.program_id(1)
    head = kv_head * GROUP + tl.program_id(0) % GROUP

    # Segment s has the tiles from start // QUERIES + s on: at least as many as it needs.
    low, high = 0, num_segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    segment = low - 1
    start = tl.load(cu_seqlens_ptr + segment)
    length = tl.load(cu_seqlens_ptr + segment + 1) - start
    first = (tile - start // QUERIES - segment) * QUERIES
    if first < length:
        token = (start + first).to(tl.int64)
        query, column = tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM)
        live = (first + query < length)[:, None]
        columns = (head * HEAD_DIM + column)[None, :]
        q = tl.load(q_ptr + token * q_stride + query[:, None] * q_stride + columns, live, 0.0)
        keys = tl.arange(0, KEYS)
        at = keys[:, None] * kv_stride + (kv_head * HEAD_DIM + column)[None, :]
        k_ptr += start.to(tl.int64) * kv_stride
        v_ptr += start.to(tl.int64) * kv_stride
        largest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
        whole = length // KEYS * KEYS
        for _ in tl.range(0, whole, KEYS, num_stages=STAGES):
            acc, largest, total = _attend(
                q, k_ptr, v_ptr, at, keys, length, acc, largest, total, scale, False
            )
            k_ptr += KEYS * kv_stride
            v_ptr += KEYS * kv_stride
        if whole < length:
            acc, largest, total = _attend(
                q, k_ptr, v_ptr, at, keys, length - whole, acc, largest, total, scale, True
            )
        acc = acc / total[:, None]
        if GATED:
            gate = tl.load(
                gate_ptr + token * gate_stride + query[:, None] * gate_stride + columns, live, 0.0
            )
            acc = acc / (1.0 + tl.exp(-gate.to(tl.float32)))
        tl.store(
            out_ptr + token * out_stride + query[:, None] * out_stride + columns,
            acc.to(out_ptr.dtype.element_ty),
            live,
        )


def gated_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor
) -> Tensor:
    """See `gated_attention`; head_dim must be a power of two, at least 16."""
    num_tokens, heads, head_dim = q.shape
    kv_heads, num_segments = k.shape[1], len(cu_seqlens) - 1
    for x in (q, k, v):
        assert x.stride(1) == head_dim
        assert x.stride(2) == 1
    assert k.stride(0) == v.stride(0)
    assert gate is None or gate.stride(1) == 1
    tiles = tiles_of(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    # So many that every segment has its own, whatever their lengths; the others end at once.
    programs = (num_tokens // tiles.queries + num_segments) * group
    _attention_kernel[(programs, kv_heads)](
        q,
        k,
        v,
        q if gate is None else gate,
        out,
        cu_seqlens,
        num_segments,
        q.stride(0),
        k.stride(0),
        0 if gate is None else gate.stride(0),
        out.stride(0),
        _LOG2_E / math.sqrt(head_dim),
        GROUP=group,
        HEAD_DIM=head_dim,
        GATED=gate is not None,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return out
