"""SGLang's int8 product runs on GPUs only; a stand-in checks how we call it."""

import inspect

import pytest
import torch

from krea2_srt.kernels.products import scaled_product
from krea2_srt.kernels.quantize import quantize_rows
from krea2_srt.model.quantization import Quantization
from tests.comparisons import relative_error


@pytest.fixture
def called(monkeypatch):
    """Put a product with the kernel's own checks in its place; returns what was called."""
    from sglang.kernels.ops.gemm import convrot_int8

    from krea2_srt.sglang import products

    real = inspect.signature(convrot_int8.convrot_int8_linear_prequant)
    calls: list[str] = []

    def stand_in(*args, **kwargs):
        calls.append("multiplied")
        given = real.bind(*args, **kwargs).arguments
        xq, xs, weight, scale = (given[n] for n in ("xq", "xs", "weight_q", "weight_scale"))
        assert given["group_size"] in convrot_int8.GROUP_SIZES
        assert xq.shape[1] == weight.shape[1]
        assert xq.shape[1] % given["group_size"] == len(weight) % 8 == 0
        assert xq.dtype == weight.dtype == torch.int8
        assert xs.dtype == scale.dtype == torch.float32
        assert xs.shape == (len(xq),)
        assert scale.shape in [(len(weight),), (len(weight), 1)]
        assert all(t.is_contiguous() for t in (xq, xs, weight, scale))
        assert given["bias"] is None
        sums = xq.float() @ weight.float().T
        return (sums * xs[:, None] * scale.reshape(1, -1)).bfloat16()

    monkeypatch.setattr(convrot_int8, "convrot_int8_linear_prequant", stand_in)
    monkeypatch.setattr(convrot_int8, "load_convrot_int8_module", lambda: calls.append("compiled"))
    products.convrot_kernel.cache_clear()
    yield calls
    products.convrot_kernel.cache_clear()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [256, 768, 6144])
def test_sglangs_kernel_is_called_as_it_wants_to_be(called, width):
    from krea2_srt.sglang.products import products

    ((name, product),) = products(Quantization("int8", rotation=True)).items()
    assert name == "sglang_convrot"
    x, weight = (quantize_rows(random(n, width, seed=n), torch.int8) for n in (5, 16))
    for _ in range(2):
        got = product(x, weight.values, weight.scale, torch.bfloat16)
    expected = scaled_product(x, weight.values, weight.scale, torch.float32)
    assert relative_error(got, expected) <= 5e-3
    assert called == ["compiled", "multiplied", "multiplied"]
    with pytest.raises(ValueError, match="bfloat16"):
        product(x, weight.values, weight.scale, torch.float32)


def test_it_is_none_of_other_formats():
    from krea2_srt.sglang.products import products

    assert products(Quantization("fp8")) == products(None) == {}
