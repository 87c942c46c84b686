"""Queries, keys and values in e4m3 with a scale per segment and head, bit for bit by the formula;
the kernels in Triton's interpreter.
"""

import pytest
import torch

from krea2_srt.kernels.quantize import LARGEST, SMALLEST
from krea2_srt.kernels.quantize_heads import E4M3, quantize_qkv, quantize_qkv_triton
from krea2_srt.model.pack import Segments
from tests.comparisons import CPU

BOTH = pytest.mark.parametrize("quantize", [quantize_qkv, quantize_qkv_triton])


def qkv(lengths, heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16):
    """Views of one matrix; every head and every segment has a magnitude of its own."""
    generator = torch.Generator().manual_seed(0)
    count = heads + 2 * kv_heads
    fused = torch.randn(sum(lengths), count + 1, head_dim, generator=generator)
    fused *= torch.logspace(-1, 1, count + 1)[:, None]
    segments = Segments.of(lengths, CPU)
    for i, (start, end) in enumerate(segments.spans):
        fused[start:end] *= 1 + i
    q, k, v, _ = fused.to(dtype).split([heads, kv_heads, kv_heads, 1], dim=1)
    return (q, k, v), segments


def bits(values):
    return values.view(torch.uint8)


def by_formula(x, kv_heads, segments):
    """Segment by segment and head by head."""
    values = torch.empty(x.shape, dtype=E4M3)
    scales = torch.empty(len(segments.spans), kv_heads)
    group = x.shape[1] // kv_heads
    for i, (start, end) in enumerate(segments.spans):
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            block = x[start:end, heads].float()
            largest = max([abs(element) for element in block.flatten().tolist()], default=0.0)
            scales[i, head] = torch.tensor(largest).clamp(min=SMALLEST) / LARGEST[E4M3]
            rounded = (block * (1 / scales[i, head])).clamp(-448, 448).to(E4M3)
            values[start:end, heads] = rounded
    return values, scales


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "lengths", [(6,), (6, 30, 0, 7), (16, 16), (0, 15, 1, 0), (64, 5)], ids=str
)
def test_by_the_formula_bit_for_bit(quantize, lengths, dtype, poisoned_outputs):
    inputs, segments = qkv(lengths, dtype=dtype)
    for x, got in zip(inputs, quantize(*inputs, segments.cu_seqlens), strict=True):
        values, scales = by_formula(x, 2, segments)
        assert torch.equal(got.scale, scales)
        assert torch.equal(bits(got.values), bits(values))
        assert got.values.is_contiguous()


@BOTH
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 8), (3, 1, 24)])
def test_any_heads(quantize, heads, kv_heads, head_dim):
    inputs, segments = qkv((9, 20), heads, kv_heads, head_dim)
    for x, got in zip(inputs, quantize(*inputs, segments.cu_seqlens), strict=True):
        values, scales = by_formula(x, kv_heads, segments)
        assert torch.equal(got.scale, scales)
        assert torch.equal(bits(got.values), bits(values))


@BOTH
def test_zeros_stay_zeros(quantize):
    zeros = torch.zeros(5, 2, 16, dtype=torch.bfloat16)
    for got in quantize(zeros, zeros, zeros, Segments.of([5], CPU).cu_seqlens):
        assert not got.values.float().any()
        assert got.scale.isfinite().all()


@BOTH
def test_a_segment_does_not_depend_on_its_neighbours(quantize):
    (q, k, v), segments = qkv((6, 30, 0, 7))
    together = quantize(q, k, v, segments.cu_seqlens)
    for i, (start, end) in enumerate(segments.spans):
        if start == end:
            continue
        offsets = Segments.of([end - start], CPU).cu_seqlens
        alone = quantize(q[start:end], k[start:end], v[start:end], offsets)
        for some, part in zip(together, alone, strict=True):
            assert torch.equal(some.scale[i : i + 1], part.scale)
            assert torch.equal(bits(some.values[start:end]), bits(part.values))
