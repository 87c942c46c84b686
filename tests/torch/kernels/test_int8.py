"""int8 behind a rotation, by the kernels for GPUs and by torch: what it loses at the released
widths, and that a matrix is the same on either.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from krea2_srt.kernels import products as module
from krea2_srt.kernels.products import Tiles, scaled_product, scaled_product_triton
from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    hadamard,
    quantize_tokens,
    quantize_tokens_triton,
    rotate,
)
from krea2_srt.model.quantization import QuantizedLinear
from tests.comparisons import CPU, relative_error

INT8 = torch.int8
WIDTHS = (6144, 16384)
"""Inputs of the released matrices."""

TOKENS, ROWS = 64, 32

INTERPRETED = 8
"""Tokens that the kernels are given, one by one."""

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(tokens=16, columns=32, depth_bytes=1024, group=2, num_warps=4)
    monkeypatch.setattr(module, "tiles_of", lambda device: tiles)


def on_gpu_kernels(x: Tensor, linear: QuantizedLinear) -> Tensor:
    tokens = quantize_tokens_triton(x, linear.format)
    return scaled_product_triton(tokens, linear.weight, linear.scale, torch.float32)


def on_torch(x: Tensor, linear: QuantizedLinear) -> Tensor:
    return linear(quantize_tokens(x, linear.format))


@cache
def matrix(width: int, rotation: int) -> tuple[QuantizedLinear, Tensor]:
    """A quantised matrix, and the weights that it was made of."""
    weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1)) * width**-0.5
    linear = QuantizedLinear(width, {"w": ROWS}, torch.float32, TokenFormat(INT8, rotation))
    ((_, slot),) = linear.weight_map("")
    assert slot.store is not None
    slot.store(weight)
    return linear, weight


def heavy_tails(width: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(2)
    chi = torch.randn(TOKENS, width, 3, generator=generator).square().sum(-1) / 3
    return torch.randn(TOKENS, width, generator=generator) / chi.sqrt()


def outliers(width: int) -> Tensor:
    """Gaussian, with one channel in a hundred 30 times as large."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, width, generator=generator)
    x[:, torch.randperm(width, generator=generator)[: width // 100]] *= 30
    return x


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [heavy_tails, outliers])
def test_a_product_behind_a_rotation_is_off_by_2_percent_at_most(
    tokens: Callable[[int], Tensor], width: int
) -> None:
    x, errors = tokens(width), {}
    for rotation in (0, 256):
        linear, weight = matrix(width, rotation)
        errors[rotation] = relative_error(on_torch(x, linear), x.double() @ weight.double().T)
    assert errors[256] <= 0.02
    assert 0.04 <= errors[0] <= 0.07

    x = x[:INTERPRETED]
    exact = x.double() @ weight.double().T
    theirs, ours = on_torch(x, linear), on_gpu_kernels(x, linear)
    assert relative_error(ours, exact) <= 0.02
    assert relative_error(ours, theirs) <= 2e-3


@pytest.mark.parametrize("width", [256, 768])
def test_rotating_both_sides_changes_no_product(width: int) -> None:
    """In float64; what the model rotates by is that matrix."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(5, width, generator=generator).double() for _ in range(2))
    by = torch.block_diag(*[hadamard(256, CPU, torch.float64)] * (width // 256))
    assert relative_error((x @ by) @ (weight @ by).T, x @ weight.T) <= 1e-14
    assert relative_error(rotate(x, 256), x @ by) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize(("width", "rotation"), [(256, 256), (768, 256), (192, 64), (256, 0)])
def test_a_matrix_multiplies_by_tritons_kernel_as_by_the_reference(
    tokens: int, width: int, rotation: int
) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    asked = []

    def product(x: QuantizedTokens, *rest) -> Tensor:
        asked.append(len(x))
        return scaled_product_triton(QuantizedTokens(Tensor(x.values), x.scale), *rest)

    linear, _ = matrix(width, rotation)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3))
    quantized = quantize_tokens(x, linear.format)
    expected = scaled_product(quantized, linear.weight, linear.scale, torch.float32)
    linear.product = product
    got = linear(QuantizedTokens(quantized.values.as_subclass(OnCuda), quantized.scale))
    assert asked == [tokens]
    assert relative_error(got, expected) <= 1e-6
