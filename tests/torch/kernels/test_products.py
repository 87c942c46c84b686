"""Matrix products with scales and SwiGLU in their epilogue, in Triton's interpreter."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from krea2_srt.kernels import products as module
from krea2_srt.kernels.gates import silu_mul
from krea2_srt.kernels.products import (
    LARGE,
    SMALL,
    Tiles,
    scaled_product,
    scaled_product_torch,
    scaled_product_triton,
    swiglu_product,
    swiglu_product_triton,
    tiles_of,
)
from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    Tokens,
    quantize_rows,
    quantize_tokens,
    quantize_tokens_triton,
)
from tests.comparisons import relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of large negative gates
]

BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
EIGHT_BITS = [E4M3, INT8]
TOLERANCE = {torch.float32: 1e-5, BF16: 5e-3}

# Tokens, width and hidden columns: single tokens, tiles with a rest in every direction, several
# groups of tiles.
SHAPES = [(1, 64, 16), (37, 160, 40), (5, 128, 64), (70, 96, 33)]
shapes = pytest.mark.parametrize(("tokens", "width", "columns"), SHAPES)
TINY = Tiles(tokens=16, columns=32, depth_bytes=64, group=2, num_warps=4)
by_pointers_and_tma = pytest.mark.parametrize(
    "tiles", [SMALL, TINY, replace(TINY, tma=True)], ids=["small", "tiny", "tma"]
)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int, width: int, columns: int, dtype: torch.dtype) -> tuple:
    """(x, weight, its scale); of 8 bits with a large token and a large channel."""
    x, weight = random(tokens, width, seed=1), random(columns, width, seed=2) * width**-0.5
    if dtype not in EIGHT_BITS:
        return x.to(dtype), weight.to(dtype), None
    x[0] *= 100
    weight[-1] *= 30
    quantized = quantize_rows(weight, dtype)
    return quantize_tokens(x, TokenFormat(dtype)), quantized.values, quantized.scale


def exact(x: Tokens, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The product in float64."""
    if isinstance(x, QuantizedTokens):
        return x.dequantized().double() @ (weight.double() * scale.double()).t()
    return x.double() @ weight.double().t()


def exact_swiglu(x: Tokens, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    gate, up = exact(x, weight, scale).chunk(2, dim=1)
    return silu(gate) * up


def cut(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    monkeypatch.setattr(module, "tiles_of", lambda device: tiles)


@shapes
@by_pointers_and_tma
@pytest.mark.parametrize("dtype", [torch.float32, BF16, E4M3, INT8], ids=str)
def test_swiglu_product(monkeypatch, dtype, tokens, width, columns, tiles):
    if tiles.tma and width * dtype.itemsize % 16:
        pytest.skip("no matrix that the accelerator can read")
    cut(monkeypatch, tiles)
    x, weight, scale = inputs(tokens, width, 2 * columns, dtype)
    out = BF16 if dtype in EIGHT_BITS else dtype
    expected = exact_swiglu(x, weight, scale)
    for product in (swiglu_product, swiglu_product_triton):
        got = product(x, weight, scale, out)
        assert got.dtype is out
        # Of the largest of each token: they differ by their scales.
        error = (got.double() - expected).abs().amax(1) / expected.abs().amax(1)
        assert error.max() <= TOLERANCE[out]


@shapes
@by_pointers_and_tma
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_scaled_product(monkeypatch, dtype, tokens, width, columns, tiles):
    cut(monkeypatch, tiles)
    x, weight, scale = inputs(tokens, width, columns, dtype)
    expected = exact(x, weight, scale)
    for product in (scaled_product, scaled_product_triton):
        got = product(x, weight, scale, BF16)
        error = (got.double() - expected).abs().amax(1) / expected.abs().amax(1)
        assert error.max() <= TOLERANCE[BF16]


@pytest.mark.parametrize("largest", [127, -128])
def test_whole_numbers_are_summed_exactly(monkeypatch, largest):
    """The largest of the released model's widths; float32 would round on the way."""
    cut(monkeypatch, replace(TINY, depth_bytes=1024))
    x, weight = (torch.full((2, 16384), largest, dtype=INT8) for _ in range(2))
    x[0, 0] = weight[0, 0] = 1
    sums = x.long() @ weight.long().T
    assert sums.abs().max() > 2**24
    ones = torch.ones(2, 1)
    got = scaled_product_triton(QuantizedTokens(x, ones), weight, ones, torch.float32)
    assert torch.equal(got, sums.float())


def test_a_sum_that_int32_might_not_hold_is_refused():
    x, one = torch.zeros(1, 2**17, dtype=INT8), torch.ones(1, 1)
    with pytest.raises(AssertionError):
        scaled_product_triton(QuantizedTokens(x, one), x, one, BF16)


@pytest.mark.parametrize("tokens", [1, 16, 17, 512, 513, 1037])
def test_torchs_int8_kernel_is_called_as_cuda_wants_it(monkeypatch, tokens):
    """A stand-in has the limits of the kernel for CUDA, which a CPU's does not have."""
    product, most = torch._int_mm, []

    def int_mm(a, b):
        assert len(a) > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        assert a.stride(1) == b.stride(0) == 1
        most.append(len(a))
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    x, weight, scale = inputs(tokens, 64, 16, INT8)
    got = scaled_product_torch(x, weight, scale, BF16)
    assert got.dtype is BF16
    assert relative_error(got, exact(x, weight, scale)) <= TOLERANCE[BF16]
    assert max(most) <= 512


def test_it_is_nearer_to_exact_than_a_product_and_then_its_gate():
    x, weight, _ = inputs(33, 256, 128, BF16)
    expected = exact_swiglu(x, weight, None)
    apart = relative_error(silu_mul(linear(x, weight)), expected)
    fused = relative_error(swiglu_product_triton(x, weight, None, BF16), expected)
    assert fused < apart <= TOLERANCE[BF16]


def test_extreme_gates_stay_finite():
    weight = torch.zeros(2, 32)
    weight[0, 0] = weight[1, 1] = 1
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([-1e4, 1e4, 0.0])
    x[:, 1] = 2
    got = swiglu_product_triton(x, weight, None, torch.float32)
    assert got.flatten().tolist() == [0, 2e4, 0]


@pytest.mark.parametrize("dtype", [BF16, E4M3, INT8], ids=str)
@pytest.mark.parametrize("rotation", [0, 16])
def test_a_quantised_result_is_the_result_quantised(dtype, rotation):
    x, weight, scale = inputs(21, 128, 512, dtype)
    format = TokenFormat(E4M3 if dtype is BF16 else dtype, rotation)
    for product, quantize in (
        (swiglu_product, quantize_tokens),
        (swiglu_product_triton, quantize_tokens_triton),
    ):
        expected = quantize(product(x, weight, scale, BF16), format)
        got = product(x, weight, scale, BF16, format)
        assert torch.equal(got.values.float(), expected.values.float())
        assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 768), (17, 100)])
def test_quantised_tokens_are_those_of_the_reference_to_the_bit(dtype, tokens, width):
    x = random(tokens, width, seed=3, dtype=BF16)
    x[0] = 0
    format = TokenFormat(dtype)
    got, expected = (f(x, format) for f in (quantize_tokens_triton, quantize_tokens))
    assert torch.equal(got.values.float(), expected.values.float())
    assert torch.equal(got.scale, expected.scale)


def test_halves_are_rounded_to_even():
    x = torch.arange(-127, 127.5, 0.5)[None]  # in steps of a scale of 1
    got = quantize_tokens_triton(x, TokenFormat(INT8))
    assert got.scale == 1
    assert torch.equal(got.values.float(), x.round())


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize(
    ("width", "rotation"), [(256, 16), (256, 256), (768, 256), (192, 64), (48, 16)]
)
def test_rotated_tokens_are_the_references(dtype, width, rotation):
    x = random(9, width, seed=4, dtype=BF16)
    format = TokenFormat(dtype, rotation)
    got, expected = quantize_tokens_triton(x, format), quantize_tokens(x, format)
    assert torch.allclose(got.scale, expected.scale, rtol=1e-6)
    # Sums in another order: here and there a number falls on the other side.
    different = got.values.float() != expected.values.float()
    assert different.float().mean() <= 0.002
    assert relative_error(got.dequantized(), expected.dequantized()) <= 2e-3


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (scaled_product_triton, scaled_product),
        (scaled_product_torch, scaled_product),
        (swiglu_product_triton, swiglu_product),
    ],
)
def test_kernels_have_their_references_signatures(kernel, reference):
    assert inspect.signature(kernel) == inspect.signature(reference)


@pytest.mark.parametrize(
    ("capability", "tiles"), [((8, 0), SMALL), ((8, 9), SMALL), ((9, 0), LARGE), ((12, 0), SMALL)]
)
def test_tiles_go_by_the_gpu(monkeypatch, capability, tiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tiles_of.cache_clear()
    try:
        assert tiles_of(torch.device("cuda:0")) is tiles
    finally:
        tiles_of.cache_clear()
