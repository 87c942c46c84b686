"""Whether SwiGLU is part of the product before it: the trial, the race, what a setting forces."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import tests.torch.interpreted_triton  # noqa: F401 (first)
from krea2_srt.errors import ConfigError
from krea2_srt.kernels import products, quantize
from krea2_srt.kernels.operations import TORCH, TRITON
from krea2_srt.kernels.products import scaled_product_triton
from krea2_srt.kernels.quantize import quantize_tokens_triton
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.layers import SwiGLU
from krea2_srt.model.quantization import Quantization, QuantizedLinear, block_linears
from krea2_srt.runner.fused_mlp import TOKENS, check_fused_mlp, first_fused, with_fused_mlp
from tests.comparisons import CPU
from tests.torch.cuda_rules import cuda_rules

INT8 = Quantization("int8", rotation=True)
KEEPING = [Quantization("fp8", keep=keep) for keep in (("*.ff.down",), ("2.*",))]
SETTINGS = [None, Quantization("fp8"), *KEEPING, INT8]


class Clock:
    """Gives either way its time, by the operation that a timed MLP really calls.

    Args:
        fused, apart: milliseconds at each number of tokens.
        fault: of the fused product.
    """

    def __init__(self, fused: tuple = (1, 1, 1), apart: tuple = (2, 2, 2), fault: str = "") -> None:
        self.ms = {"fused": fused, "apart": apart}
        self.last: tuple[str, int] = ("", 0)
        self.timed: list[tuple[str, int]] = []

        def swiglu_product(x, *rest):
            self.last = ("fused", len(x))
            if fault == "raises":
                raise RuntimeError("out of resource: shared memory\nRequired: much")
            found = TORCH.swiglu_product(x, *rest)
            if fault == "nan":
                getattr(found, "scale", found)[0] = math.nan
            return found if fault != "differs" else TORCH.swiglu_product(x, rest[0] * 2, *rest[1:])

        def silu_mul(gate_up, format):
            self.last = ("apart", len(gate_up))
            return TORCH.silu_mul(gate_up, format)

        self.operations = replace(
            TORCH, name="triton", swiglu_product=swiglu_product, silu_mul=silu_mul
        )

    def __call__(self, function: Callable[[], object]) -> float:
        function()
        self.timed.append(self.last)
        way, tokens = self.last
        return self.ms[way][TOKENS.index(tokens)]


def model(folder: Path, clock: Clock, quantization: Quantization | None = None):
    dit = load_dit(folder / "transformer", CPU, torch.bfloat16, quantization)
    dit.operations = clock.operations
    return dit


@pytest.mark.parametrize("quantization", SETTINGS, ids=str)
def test_both_ways_are_timed_and_the_faster_one_taken(demo_model, quantization, caplog):
    caplog.set_level("INFO")
    clock = Clock(fused=(3, 2, 1), apart=(2, 2.5, 3))
    chosen = with_fused_mlp(model(demo_model, clock, quantization), "auto", clock)
    # In 8 bits everywhere or nowhere: the two ways are not the same picture.
    exact = quantization is None or quantization.keeps("1.ff.down")
    first, said = (1088, "from 1088 tokens on") if exact else (math.inf, "never")
    assert chosen == replace(clock.operations, fused_mlp_tokens=first)
    assert clock.timed == [(way, tokens) for way in ("fused", "apart") for tokens in TOKENS]
    (line,) = caplog.messages
    assert f"MLP fused {said}; ms of one at 320, 1088, 4160 tokens: fused 3, 2," in line


@pytest.mark.parametrize("quantization", SETTINGS, ids=str)
def test_it_is_taken_everywhere_where_it_always_wins(demo_model, quantization):
    clock = Clock(fused=(1, 1, 1), apart=(2, 2, 2))
    chosen = with_fused_mlp(model(demo_model, clock, quantization), "auto", clock)
    assert chosen.fused_mlp_tokens == 0


def test_one_that_does_few_tokens_and_not_many_is_passed_over(demo_model, caplog):
    caplog.set_level("INFO")
    clock = Clock()
    dit = model(demo_model, clock)

    def out_of_memory(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert with_fused_mlp(dit, "auto", out_of_memory).fused_mlp_tokens == math.inf
    assert "passed over: OutOfMemoryError: CUDA out of memory" in caplog.text


@pytest.mark.parametrize(
    ("fused", "apart", "first"),
    [
        ((1, 1, 1), (2, 2, 2), 0),
        ((3, 1, 1), (2, 2, 2), 1088),
        ((1, 3, 1), (2, 2, 2), 4160),
        ((1, 1, 3), (2, 2, 2), math.inf),
        ((2, 2, 2), (2, 2, 2), math.inf),
    ],
)
def test_it_is_taken_from_where_it_is_faster_at_every_size(fused, apart, first):
    assert first_fused(fused, apart) == first


@pytest.mark.parametrize("fault", ["raises", "differs", "nan"])
@pytest.mark.parametrize("quantization", SETTINGS[:2], ids=str)
def test_one_that_fails_its_trial_is_passed_over(demo_model, quantization, fault, caplog):
    caplog.set_level("INFO")
    clock = Clock(fault=fault)
    dit = model(demo_model, clock, quantization)
    assert with_fused_mlp(dit, "auto", clock).fused_mlp_tokens == math.inf
    assert clock.timed == []
    (line,) = caplog.messages
    assert "the fused MLP is passed over: " in line
    assert "\n" not in line
    with pytest.raises(ConfigError, match=r"^fused_mlp: it fails on this device: "):
        with_fused_mlp(dit, "on", clock)


def test_a_setting_is_taken_without_a_race(demo_model):
    clock = Clock(fused=(9, 9, 9))
    dit = model(demo_model, clock)
    assert with_fused_mlp(dit, "on", clock).fused_mlp_tokens == 0
    assert clock.last[0] == "fused"
    clock.last = ("", 0)
    assert with_fused_mlp(dit, "off", clock).fused_mlp_tokens == math.inf
    assert clock.last == ("", 0)
    assert clock.timed == []


def test_without_tritons_kernels_there_is_none(demo_model):
    clock = Clock()
    dit = model(demo_model, clock)
    dit.operations = TORCH
    assert with_fused_mlp(dit, "auto", clock) == TORCH
    assert clock.timed == []
    check_fused_mlp("on", clock.operations)
    check_fused_mlp("auto", TORCH)
    with pytest.raises(ConfigError, match=r"^fused_mlp: on needs Triton's kernels"):
        check_fused_mlp("on", TORCH)


@pytest.mark.parametrize("quantization", [None, Quantization("fp8", rotation=True), INT8], ids=str)
@pytest.mark.parametrize("tma", [True, False])
def test_it_is_captured_and_replayed_by_cudas_rules(monkeypatch, quantization, tma):
    monkeypatch.setattr(products, "tiles_of", lambda device: replace(products.SMALL, tma=tma))
    # What is remembered of one machine's devices is of no use on another.
    monkeypatch.setattr(quantize, "hadamard", cache(quantize.hadamard.__wrapped__))
    cuda = torch.device("cuda", 0)
    with cuda_rules() as machine, torch.inference_mode():
        with cuda:
            mlp = SwiGLU(256, 512, block_linears(quantization, 0, torch.bfloat16))
        for linear in (mlp.gate_up, mlp.down):
            if isinstance(linear, QuantizedLinear):
                linear.product = scaled_product_triton
        x = torch.zeros(9, 256, dtype=torch.bfloat16, device=cuda)

        def forward() -> torch.Tensor:
            format = mlp.gate_up.format
            tokens = x if format is None else quantize_tokens_triton(x, format)
            return mlp(tokens, replace(TRITON, fused_mlp_tokens=0))

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
            launched = machine.launched
            forward()
            # A product with its SwiGLU, and one; of 8 bits each quantises what it reads before.
            assert machine.launched - launched == (2 if quantization is None else 4)
            graph.capture_begin()
            out = forward()
            graph.capture_end()
            graph.replay()
        torch.cuda.synchronize()
        assert (out.shape, out.dtype) == ((9, 256), torch.bfloat16)
