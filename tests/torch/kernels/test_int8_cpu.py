"""On a CPU, work in pieces that stay in its caches: to the bits of work on the whole."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from krea2_srt.kernels import int8_cpu, quantize
from krea2_srt.kernels.gates import sigmoid_gate, silu_mul
from krea2_srt.kernels.int8_cpu import int8_product_cpu
from krea2_srt.kernels.norm import norm_scale_shift
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat, quantize_tokens
from krea2_srt.kernels.segment_index import SegmentIndex

INT8, BF16 = torch.int8, torch.bfloat16


def random(*shape: int, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8(*shape: int, seed=0) -> QuantizedTokens:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, dtype=INT8, generator=generator)
    return QuantizedTokens(values, torch.rand(shape[0], 1, generator=generator) + 0.01)


def saturating(x, weight, out=None):
    """As oneDNN multiplies without VNNI: x from 0 on, and pairs of products in 16 bits."""
    pairs = (x.long() + 128)[:, None] * weight.t().long()
    sums = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1)
    found = (sums - 128 * weight.t().long().sum(-1)).int()
    return found if out is None else out.copy_(found)


@pytest.fixture
def without_vnni(monkeypatch):
    """A CPU on which torch's product is not exact."""
    monkeypatch.setattr(torch, "_int_mm", saturating)
    int8_cpu._torch_is_exact.cache_clear()
    yield
    int8_cpu._torch_is_exact.cache_clear()


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 40])
@pytest.mark.parametrize(("columns", "width"), [(200, 256), (64, 16), (7, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_products_are_exact_sums_with_scales(monkeypatch, tokens, columns, width, dtype):
    monkeypatch.setattr(int8_cpu, "_SUMS", 64 * 17)
    monkeypatch.setattr(int8_cpu, "_LEAST_COLUMNS", 48)
    x, weight = int8(tokens, width), int8(columns, width, seed=1)
    sums = x.values.long() @ weight.values.long().t()
    expected = (sums.float() * x.scale * weight.scale.t()).to(dtype)
    got = int8_product_cpu(x, weight.values, weight.scale, dtype)
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def test_the_largest_sums_of_the_released_model_fit():
    x = QuantizedTokens(torch.full((2, 16384), -128, dtype=INT8), torch.ones(2, 1))
    got = int8_product_cpu(x, x.values, x.scale, torch.float32)
    assert torch.equal(got, torch.full((2, 2), 16384.0 * 128 * 128))


@pytest.mark.usefixtures("without_vnni")
def test_products_are_exact_where_torchs_are_not(caplog):
    caplog.set_level("INFO", "krea2_srt")
    x, weight = int8(17, 3000), int8(200, 3000, seed=1)
    sums = x.values.long() @ weight.values.long().t()
    assert not torch.equal(saturating(x.values, weight.values.t()).long(), sums)
    for _ in range(2):
        got = int8_product_cpu(x, weight.values, weight.scale, torch.float32)
        assert torch.equal(got, sums.float() * x.scale * weight.scale.t())
    test_the_largest_sums_of_the_released_model_fit()
    (line,) = caplog.messages
    assert "int8 is multiplied in float32" in line


_ON_AN_OLDER_CPU = """
import torch
from krea2_srt.kernels.int8_cpu import int8_product_cpu
from krea2_srt.kernels.quantize import QuantizedTokens
x = torch.randint(-127, 128, (40, 256), dtype=torch.int8)
ones = torch.ones(40, 1)
got = int8_product_cpu(QuantizedTokens(x, ones), x, ones, torch.float32)
assert torch.equal(got, (x.long() @ x.long().t()).float())
"""


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_products_are_exact_whatever_a_cpu_can_do(instructions):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", _ON_AN_OLDER_CPU], env=environment, check=True)


FORMATS = [None, TokenFormat(), TokenFormat(INT8), TokenFormat(INT8, 16)]


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kernel", ["norm", "sigmoid_gate", "silu_mul", "quantize"])
def test_pieces_are_the_whole(monkeypatch, tokens, format, kernel):
    width, x = 48, random(tokens, 2 * 48, dtype=BF16)
    left, right = x.chunk(2, dim=1)
    kept = x.clone()
    ends = [0, max(1, tokens // 3), tokens]
    spans = tuple((a, b, row) for row, (a, b) in enumerate(pairwise(ends)))
    rows = SegmentIndex(torch.tensor([row for a, b, row in spans for _ in range(a, b)]), spans)

    def result():
        match kernel:
            case "norm":
                scale, shift = random(2, width, seed=1), random(2, width, seed=2)
                return norm_scale_shift(left.contiguous(), scale, shift, rows, 1e-5, format)
            case "sigmoid_gate":
                return sigmoid_gate(left.contiguous(), right, format)
            case "silu_mul":
                return silu_mul(x, format)
        return quantize_tokens(left, format or TokenFormat(INT8))

    expected = result()
    monkeypatch.setattr(quantize, "_PIECE_ELEMENTS", 4 * width + 1)
    got = result()
    assert torch.equal(x, kept)
    if not isinstance(got, QuantizedTokens):
        assert torch.equal(got, expected)
        return
    assert torch.allclose(got.scale, expected.scale, rtol=1e-6)
    differing = (got.values.float() - expected.values.float()).abs()
    # A rotation's sums may come in another order, which moves a value to its neighbour.
    assert differing.max() <= (1 if format and format.rotation else 0)
    assert differing.count_nonzero() <= got.values.numel() // 100


@pytest.mark.parametrize("sizes", [[2, 2, 2, 1], [1, 1, 1, 2, 1, 1]])
def test_no_more_is_held_than_a_piece(monkeypatch, sizes):
    monkeypatch.setattr(quantize, "_PIECE_ELEMENTS", 2 * 16)
    x, quantized, made = random(7, 16), [], 0
    plain = quantize.quantize_rows

    def watched(x, dtype):
        quantized.append(len(x))
        return plain(x, dtype)

    def pieces():
        nonlocal made
        for piece in x.split(sizes):
            # One may wait for whether the next still fits.
            assert made - sum(quantized) <= 2
            made += len(piece)
            yield piece

    monkeypatch.setattr(quantize, "quantize_rows", watched)
    got = quantize.finish_tokens(pieces(), x, TokenFormat(INT8))
    assert max(quantized) == 2
    assert sum(quantized) == 7
    assert torch.equal(got.values, plain(x, INT8).values)
