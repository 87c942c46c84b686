"""Which kernel multiplies in 8 bits: trials, the race and what a setting forces."""

import math
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.products import ScaledProduct, scaled_product
from krea2_srt.kernels.quantize import quantize_rows
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.quantization import DTYPES, Quantization, QuantizedLinear
from krea2_srt.runner.products import (
    TOKENS,
    known_products,
    product_candidates,
    use_fastest_product,
)
from tests.comparisons import CPU, relative_error

CUDA, FP8 = torch.device("cuda"), Quantization("fp8")
INT8 = Quantization("int8", rotation=True)
both = pytest.mark.parametrize("quantization", [FP8, INT8], ids=lambda q: q.format)


@pytest.fixture(scope="module")
def loaded(demo_model: Path):
    """The demo model in a format; loaded once, as nothing but its products is changed."""
    folder = demo_model / "transformer"
    return cache(lambda quantization: load_dit(folder, CPU, torch.bfloat16, quantization))


@pytest.fixture
def dit(loaded):
    return loaded(FP8)


def linears(dit) -> list[QuantizedLinear]:
    return [module for module in dit.modules() if isinstance(module, QuantizedLinear)]


class Clock:
    """Gives each candidate its time, by what a timed function really calls.

    Args:
        ms: by name, of a product at either number of tokens.
    """

    def __init__(self, **ms: tuple[float, float]) -> None:
        self.ms = ms
        self.last: tuple[str, int] = ("", 0)
        self.timed: list[tuple[str, int]] = []

    def candidate(self, name: str, fault: str = "") -> ScaledProduct:
        def product(x, weight, scale, dtype):
            self.last = (name, len(x))
            if fault == "raises":
                raise RuntimeError("no kernel image\nis available")
            found = scaled_product(x, weight, scale, dtype)
            if fault == "nan":
                found[-1, -1] = math.nan
            return found * 1.1 if fault == "differs" else found

        return product

    @property
    def candidates(self) -> dict[str, ScaledProduct]:
        return {name: self.candidate(name) for name in self.ms}

    def __call__(self, function: Callable[[], object]) -> float:
        function()
        self.timed.append(self.last)
        name, tokens = self.last
        return self.ms[name][TOKENS.index(tokens)]


@both
def test_all_matrices_take_the_fastest(loaded, quantization, caplog):
    caplog.set_level("INFO")
    dit = loaded(quantization)
    clock = Clock(slow=(2, 30), fast=(1, 20))
    candidates = clock.candidates
    assert use_fastest_product(dit, candidates, clock) == "fast"
    assert len(linears(dit)) == 16
    assert {linear.product for linear in linears(dit)} == {candidates["fast"]}
    # Each shape of matrix once.
    assert sorted(clock.timed) == sorted((n, t) for n in clock.ms for t in TOKENS for _ in range(4))
    (line,) = caplog.messages
    assert "8-bit product fast; ms of a block's at 320 and 4160 tokens: fast 4 and 80," in line


def test_small_and_large_packs_count_alike(dit):
    clock = Clock(small=(1, 21), large=(2, 20))
    assert use_fastest_product(dit, clock.candidates, clock) == "small"


@both
@pytest.mark.parametrize("fault", ["raises", "differs", "nan"])
def test_one_that_fails_its_trial_is_passed_over(loaded, quantization, fault, caplog):
    caplog.set_level("INFO")
    dit = loaded(quantization)
    clock = Clock(broken=(1, 1), works=(9, 9))
    candidates = clock.candidates | {"broken": clock.candidate("broken", fault)}
    assert use_fastest_product(dit, candidates, clock) == "works"
    assert "8-bit product broken is passed over" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    with pytest.raises(ConfigError, match=r"^products: none works on this device: broken: "):
        use_fastest_product(dit, {"broken": clock.candidate("broken", fault)}, clock)


def test_a_forced_one_is_tried_and_not_timed(dit):
    clock = Clock(slow=(9, 9), fast=(1, 1))
    candidates = product_candidates("slow", CUDA, FP8, clock.candidates)
    assert use_fastest_product(dit, candidates, clock) == "slow"
    assert clock.last[0] == "slow"
    assert clock.timed == []


@both
def test_what_is_not_there_is_refused(quantization):
    known = {"torch": scaled_product, "triton": scaled_product}
    assert product_candidates("auto", CUDA, quantization, known) == known
    message = rf"^products: sglang is not there for {quantization.format}; there are torch, triton$"
    with pytest.raises(ConfigError, match=message):
        product_candidates("sglang", CUDA, quantization, known)


@pytest.mark.parametrize(("device", "quantization"), [(CPU, FP8), (CPU, INT8), (CUDA, None)])
def test_without_8_bits_on_a_gpu_there_is_nothing_to_choose(dit, device, quantization):
    for forced in ("auto", "torch"):
        assert product_candidates(forced, device, quantization, known_products()) == {}
    message = r"^products: triton multiplies matrices of --quantization fp8 or int8 on a GPU, and"
    with pytest.raises(ConfigError, match=message):
        product_candidates("triton", device, quantization, known_products())
    assert use_fastest_product(dit, {}) == ""


def test_a_model_that_keeps_all_its_matrices_needs_none(demo_model):
    keep = Quantization("fp8", keep=("*",))
    dit = load_dit(demo_model / "transformer", CPU, torch.bfloat16, keep)
    clock = Clock(any=(1, 1))
    assert use_fastest_product(dit, clock.candidates, clock) == ""
    assert clock.timed == []


def test_tritons_own_is_left_out_where_its_kernels_are():
    assert "triton" in known_products()
    assert "triton" not in known_products(triton=False)


@both
def test_sglangs_kernel_is_called_as_it_wants_to_be(loaded, quantization, monkeypatch):
    """A stand-in with the checks of the package's own: layouts, sizes and dtypes."""
    dit, dtype = loaded(quantization), DTYPES[quantization.format]

    def scaled_mm(mat_a, mat_b, scales_a, scales_b, out_dtype, bias=None):
        assert mat_a.stride(1) == 1
        assert mat_b.stride(0) == 1
        assert mat_a.shape[1] == mat_b.shape[0]
        assert mat_a.shape[1] % 16 == mat_b.shape[1] * out_dtype.itemsize % 16 == 0
        assert mat_a.dtype == mat_b.dtype == dtype
        assert out_dtype in (torch.float16, torch.bfloat16)
        assert scales_a.numel() == mat_a.shape[0]
        assert scales_b.numel() == mat_b.shape[1]
        assert scales_a.is_contiguous()
        assert scales_b.is_contiguous()
        assert scales_a.dtype == scales_b.dtype == torch.float32
        assert bias is None
        product = mat_a.float() @ mat_b.float()
        return (product * scales_a.view(-1, 1) * scales_b.view(1, -1)).to(out_dtype)

    package = types.ModuleType("sgl_kernel")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    # The other format's is not there: it must not be asked for.
    setattr(package, f"{quantization.format}_scaled_mm", scaled_mm)
    monkeypatch.setitem(sys.modules, "sgl_kernel", package)
    sglang = {"sglang": known_products()["sglang"]}
    assert use_fastest_product(dit, sglang) == "sglang"
    linear = linears(dit)[0]
    x = torch.randn(5, linear.weight.shape[1], generator=torch.Generator().manual_seed(0))
    tokens = quantize_rows(x, dtype)
    got = linear.product(tokens, linear.weight, linear.scale, torch.bfloat16)
    assert relative_error(got, linear(tokens)) <= 1e-2
