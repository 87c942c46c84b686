"""8-bit matrices: how exactly they hold weights, how they load, and that they still generate."""

import re
import weakref
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.quantize import TokenFormat, quantize_tokens, rotate
from krea2_srt.model import quantization as module
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.quantization import MATRICES, Quantization, QuantizedLinear
from krea2_srt.request import ImageRequest
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU, PROMPT, psnr, relative_error

BF16 = torch.bfloat16
ALL = [Quantization(f, rotation) for f in ("fp8", "int8") for rotation in (False, True)]
every = pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)


def quantized(dit) -> list[QuantizedLinear]:
    return [m for m in dit.modules() if isinstance(m, QuantizedLinear)]


def linear(format: TokenFormat, rows=24, width=256, seed=0) -> tuple[QuantizedLinear, torch.Tensor]:
    """A quantised matrix of two parts, and the weights that it was made of."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02
    # Channels of different size, as real ones are: each has its own scale.
    weight *= torch.logspace(-3, 3, rows)[:, None]
    made = QuantizedLinear(width, {"a": rows - 8, "b": 8}, torch.float32, format)
    weight_map = dict(made.weight_map("x."))
    weight_map["x.a.weight"].store(weight[:-8])
    weight_map["x.b.weight"].store(weight[-8:])
    return made, weight


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("at_once", [5, 2048])
def test_fp8_weights_come_back_within_the_formats_error(monkeypatch, rotation, at_once):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", at_once)
    made, weight = linear(TokenFormat(rotation=rotation))
    expected = rotate(weight, rotation) if rotation else weight
    back = made.weight.float() * made.scale
    # Half a unit of 3 bits of fraction; below the smallest normal number, half its step.
    largest = expected.abs().amax(1, keepdim=True)
    bound = torch.maximum(expected.abs() * 2**-4, largest / 448 * 2**-10) * 1.001
    assert ((back - expected).abs() <= bound).all()
    assert torch.allclose(made.scale, largest / 448, rtol=1e-6)


def test_int8_weights_come_back_within_half_a_step():
    made, weight = linear(TokenFormat(torch.int8))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((made.weight.float() * made.scale - weight).abs() <= step * 0.501).all()


@pytest.mark.parametrize("width", [256, 768])
def test_rotating_weights_and_inputs_changes_no_product(width):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, width, generator=generator), torch.randn(5, width, generator=generator)
    block = module.rotation_block(width)
    assert block
    assert relative_error(rotate(x, block) @ rotate(w, block).T, x.double() @ w.double().T) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_product_is_that_of_what_the_8_bits_mean(dtype, tokens):
    format = TokenFormat(dtype, 16)
    made, _ = linear(format)
    x = quantize_tokens(
        torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)), format
    )
    expected = x.dequantized().double() @ (made.weight.double() * made.scale.double()).T
    assert relative_error(made(x), expected) <= 1e-6


def test_on_cuda_torchs_kernel_is_called_as_it_wants_to_be(monkeypatch):
    """A stand-in checks what rowwise scaling asks for: layouts, shapes and dtypes of scales."""
    made, _ = linear(TokenFormat())
    made.dtype = BF16
    x = quantize_tokens(
        torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), made.format
    )

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert (scale_a.shape, scale_b.shape) == ((3, 1), (1, 24))
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_b.is_contiguous()
        assert out_dtype == BF16
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    expected = made(x)
    x = type(x)(x.values.as_subclass(OnCuda), x.scale)
    assert relative_error(torch.Tensor(made(x).float()), expected.float()) <= 1e-2


@every
@pytest.mark.parametrize("original", [True, False])
def test_only_the_matrices_of_the_blocks_are_quantised(
    demo_model, original_file, quantization, original
):
    path = original_file if original else demo_model / "transformer"
    plain, dit = load_dit(path, CPU, BF16), load_dit(path, CPU, BF16, quantization)
    assert len(quantized(dit)) == 4 * len(dit.blocks)
    kept = {name: p for name, p in dit.named_parameters() if p.dtype not in (torch.int8, E4M3)}
    theirs = dict(plain.named_parameters())
    for name, p in kept.items():
        if not re.fullmatch(r"blocks\.\d\.(attn\.(qkvg|out)|ff\.(gate_up|down))\.scale", name):
            assert torch.equal(p, theirs.pop(name))
    assert sorted(theirs) == sorted(
        f"blocks.{i}.{matrix}.weight" for i in range(len(dit.blocks)) for matrix in MATRICES
    )


E4M3 = torch.float8_e4m3fn


def test_what_is_to_be_kept_stays_to_the_bit(demo_model):
    plain = load_dit(demo_model / "transformer", CPU, BF16)
    keep = ("0.*", "?.attn.out", "3.ff.down")
    dit = load_dit(demo_model / "transformer", CPU, BF16, Quantization("fp8", keep=keep))
    names = {n for n, m in dit.named_modules() if isinstance(m, QuantizedLinear)}
    assert names == {
        f"blocks.{i}.{m}" for i in (1, 2, 3) for m in ("attn.qkvg", "ff.gate_up", "ff.down")
    } - {"blocks.3.ff.down"}
    for name, p in plain.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(dit.get_parameter(name), p)


@pytest.mark.parametrize("pattern", ["4.ff.down", "attn", "0.attn.to_q", ""])
def test_a_name_that_fits_no_matrix_is_refused(demo_model, pattern):
    with pytest.raises(ConfigError, match=f"^quantization: no matrix is called {pattern!r}"):
        load_dit(demo_model / "transformer", CPU, BF16, Quantization("fp8", keep=(pattern,)))


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"^quantization: must be one of fp8, int8, got 'fp4'"):
        Quantization("fp4")


def test_loading_never_holds_the_weights_twice(demo_model, monkeypatch):
    """At any moment at most one stored matrix is alive beside the model, and few rows of floats."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 64)
    alive: list[weakref.ref] = []
    most = 0
    quantize, store = module.quantize_rows, QuantizedLinear._store

    def watched_store(self, start, stored):
        nonlocal most
        alive.append(weakref.ref(stored))
        most = max(most, sum(ref() is not None for ref in alive))
        store(self, start, stored)

    def watched_quantize(x, dtype):
        assert len(x) <= 64
        return quantize(x, dtype)

    monkeypatch.setattr(QuantizedLinear, "_store", watched_store)
    monkeypatch.setattr(module, "quantize_rows", watched_quantize)
    dit = load_dit(demo_model / "transformer", CPU, BF16, Quantization("fp8", rotation=True))
    assert len(alive) == 7 * len(dit.blocks) + len(dit.blocks)
    assert most == 1


@pytest.fixture(scope="module")
def pictures(demo_model: Path):
    """Draw the same picture with any quantisation, in bf16."""
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    known: dict[Quantization | None, torch.Tensor] = {}

    def draw(quantization: Quantization | None) -> torch.Tensor:
        if quantization not in known:
            runner = Krea2Runner.load(checkpoint, CPU, BF16, quantization=quantization)
            image = ImageRequest(PROMPT, 256, 256, 8, seed=3)
            sequence = runner.start(image, runner.encode(image.prompts))
            while not sequence.done:
                runner.step([sequence])
            known[quantization] = runner.decode(sequence)
        return known[quantization]

    return draw


# Ten seconds of bfloat16 each on a CPU without its instructions.
@pytest.mark.parametrize(
    "quantization",
    [pytest.param(q, marks=() if q.name == "fp8" else pytest.mark.slow) for q in ALL],
    ids=lambda q: q.name,
)
@pytest.mark.slow
def test_a_quantised_demo_still_generates(pictures, quantization):
    assert 25 <= psnr(pictures(quantization), pictures(None)) < 100


def heavy_tailed(tokens: int, width: int) -> torch.Tensor:
    """Gaussian, with a few channels that are 30 times as large, as DiTs have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    x[:, torch.randperm(width, generator=generator)[: width // 100]] *= 30
    return x


def error(format: TokenFormat, x: torch.Tensor) -> float:
    """Relative error of a product with a random matrix of 512 rows."""
    made, _ = linear(format)
    weight = torch.randn(512, x.shape[1], generator=torch.Generator().manual_seed(5))
    made = QuantizedLinear(x.shape[1], {"a": 512}, torch.float32, format)
    made._store(0, weight)
    return relative_error(made(quantize_tokens(x, format)), x.double() @ weight.double().T)


def test_a_rotation_helps_int8_with_heavy_tails():
    x = heavy_tailed(32, 1024)
    plain, rotated = (error(TokenFormat(torch.int8, block), x) for block in (0, 64))
    assert rotated < 0.7 * plain
