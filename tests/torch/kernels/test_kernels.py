"""Triton kernels and their torch references, in Triton's interpreter, against float64."""

import inspect
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea2_srt.kernels.operations import TORCH, TRITON
from krea2_srt.kernels.quantize import (
    LARGEST,
    QuantizedTokens,
    TokenFormat,
    hadamard,
    rotate,
    rotation_block,
)
from krea2_srt.kernels.segment_index import SegmentIndex
from tests.comparisons import relative_error
from tests.dialects import rotated

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]
# Tokens of each sequence, and the width. Odd ones, single tokens, empty sequences, and widths
# that are no power of two.
PACKS = [((1,), 64), ((5, 0, 1, 17), 96), ((3, 3), 256), ((40, 1), 336)]
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
FORMATS = [TokenFormat(dtype, rotation) for dtype in (E4M3, INT8) for rotation in (0, 16, 256)]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

both = pytest.mark.parametrize("do", [TORCH, TRITON], ids=lambda do: do.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
packs = pytest.mark.parametrize(("lengths", "width"), PACKS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(lengths, known: bool = True) -> SegmentIndex:
    index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    spans, start = [], 0
    for row, length in enumerate(lengths):
        spans.append((start, start + length, row))
        start += length
    return SegmentIndex(index, tuple(spans) if known else None)


def check(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got.float()).all()
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]


def check_quantized(got: QuantizedTokens, expected: torch.Tensor, format: TokenFormat) -> None:
    """Within half a unit in the last of e4m3's 3 bits, or half its smallest step; of int8 within
    half a step.
    """
    assert got.values.dtype is format.dtype
    if format.rotation:
        expected = rotate(expected.float(), format.rotation).double()
    values = got.values.double() * got.scale.double()
    assert torch.isfinite(values).all()
    largest = expected.abs().amax(1, keepdim=True)
    step = largest / LARGEST[format.dtype]
    half = step / 2 if format.dtype is INT8 else expected.abs() * 2**-4 + step * 2**-10
    # What comes before is computed in float32.
    assert ((values - expected).abs() <= half + largest * 1e-5).all()
    assert torch.allclose(got.scale.double(), step, rtol=1e-5, atol=1e-14)


def exact_norm(x, scale, shift, rows):
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x * scale.double()[rows.index] + shift.double()[rows.index]


def tables(lengths, width):
    # Strided rows, as one block's part of a whole model's table.
    many = random(len(lengths), 3, 2, width, seed=7)
    return 1 + many[:, 1, 0], many[:, 2, 1]


@both
@dtypes
@packs
@pytest.mark.parametrize("known", [True, False])
def test_norm_scale_shift(do, dtype, lengths, width, known):
    rows = rows_of(lengths, known)
    x, (scale, shift) = random(sum(lengths), width, dtype=dtype), tables(lengths, width)
    check(do.norm_scale_shift(x, scale, shift, rows, EPS), exact_norm(x, scale, shift, rows), dtype)


@both
@dtypes
@packs
@pytest.mark.parametrize("known", [True, False])
def test_add_gated(do, dtype, lengths, width, known):
    rows = rows_of(lengths, known)
    x, branch = (random(sum(lengths), width, dtype=dtype, seed=seed) for seed in (0, 1))
    gate = random(len(lengths), 2, width, dtype=dtype, seed=2)[:, 1]
    expected = x.double() + gate.double()[rows.index] * branch.double()
    got = do.add_gated(x, gate, branch, rows)
    assert got.data_ptr() == x.data_ptr()
    check(x, expected, dtype)


@both
@dtypes
@packs
def test_add_gated_norm_is_one_after_the_other(do, dtype, lengths, width):
    rows = rows_of(lengths)
    x, branch = (random(sum(lengths), width, dtype=dtype, seed=seed) for seed in (0, 1))
    gate = random(len(lengths), 2, width, dtype=dtype, seed=2)[:, 1]
    scale, shift = tables(lengths, width)
    alone = do.add_gated(x.clone(), gate, branch, rows)
    expected = do.norm_scale_shift(alone, scale, shift, rows, EPS)
    got = do.add_gated_norm(x, gate, branch, scale, shift, rows, EPS)
    # To the bit: a step in slices norms in a kernel of its own what a whole step norms here.
    assert torch.equal(x, alone)
    assert torch.equal(got, expected)
    check(got, exact_norm(x, scale, shift, rows), dtype)


@both
@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 32), (6, 2, 16), (1, 1, 128)])
@pytest.mark.parametrize("rotated", [True, False])
def test_qk_norm_rope(do, dtype, heads, kv_heads, head_dim, rotated):
    tokens, rest = 5, (kv_heads + heads) * head_dim
    width = (heads + kv_heads) * head_dim
    projection = random(tokens, width + rest, dtype=dtype)
    q_scale, k_scale = 1 + random(head_dim, seed=1), 1 + random(head_dim, seed=2)
    angle = random(tokens, head_dim // 2, seed=3) * 10
    rope = torch.polar(torch.ones_like(angle), angle) if rotated else None
    x = projection[:, :width].double().unflatten(1, (-1, head_dim))
    scale = torch.stack([q_scale] * heads + [k_scale] * kv_heads).double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * scale
    if rope is not None:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        x = torch.view_as_real(pairs * rope.to(torch.complex128)[:, None]).flatten(-2)
    before = projection.clone()
    do.qk_norm_rope(projection, q_scale, k_scale, rope, heads, kv_heads, EPS)
    check(projection[:, :width], x.flatten(1), dtype)
    assert torch.equal(projection[:, width:], before[:, width:])


@both
@dtypes
@packs
def test_gates(do, dtype, lengths, width):
    tokens = sum(lengths)
    fused = random(tokens, 3 * width, dtype=dtype)
    out, gate = random(tokens, width, dtype=dtype, seed=1), fused[:, width : 2 * width]
    expected = out.double() * torch.sigmoid(gate.double())
    check(do.sigmoid_gate(out, gate), expected, dtype)
    gate_up = random(tokens, 2 * width, dtype=dtype, seed=2) * 3
    gate, up = gate_up.double().chunk(2, dim=1)
    check(do.silu_mul(gate_up), gate * torch.sigmoid(gate) * up, dtype)


@both
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "width"), [((5, 0, 1), 256), ((2, 3), 768)])
def test_quantised_results(do, format, dtype, lengths, width):
    tokens, rows = sum(lengths), rows_of(lengths)
    # A few large channels, as real activations have.
    heavy = torch.ones(width).index_fill_(0, torch.tensor([3, width - 1]), 30.0)
    x = (random(tokens, width) * heavy).to(dtype)
    x[0] = 0
    scale, shift = tables(lengths, width)
    expected = exact_norm(x, scale, shift, rows)
    check_quantized(do.norm_scale_shift(x, scale, shift, rows, EPS, format), expected, format)
    gate = random(len(lengths), width, dtype=dtype, seed=2)
    branch = random(tokens, width, dtype=dtype, seed=3)
    got = do.add_gated_norm(x, gate, branch, scale, shift, rows, EPS, format)
    check_quantized(got, exact_norm(x, scale, shift, rows), format)
    gate = random(tokens, width, dtype=dtype, seed=4)
    expected = x.double() * torch.sigmoid(gate.double())
    check_quantized(do.sigmoid_gate(x, gate, format), expected, format)
    expected = torch.nn.functional.silu(gate.double()) * x.double()
    check_quantized(do.silu_mul(torch.cat([gate, x], 1), format), expected, format)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_kernels_on_random_shapes(lengths, width, dtype, seed):
    do, tokens, rows = TRITON, sum(lengths), rows_of(lengths)
    x, branch = (random(tokens, width, dtype=dtype, seed=seed + i) for i in range(2))
    gate, (scale, shift) = random(len(lengths), width, dtype=dtype), tables(lengths, width)
    check(do.norm_scale_shift(x, scale, shift, rows, EPS), exact_norm(x, scale, shift, rows), dtype)
    got = do.add_gated_norm(x, gate, branch, scale, shift, rows, EPS)
    check(got, exact_norm(x, scale, shift, rows), dtype)
    check(do.sigmoid_gate(x, branch), x.double() * torch.sigmoid(branch.double()), dtype)
    expected = torch.nn.functional.silu(branch.double()) * x.double()
    check(do.silu_mul(torch.cat([branch, x], 1)), expected, dtype)
    weight, bias = random(16, width, dtype=dtype), random(16, dtype=dtype)
    expected = exact_norm(x, scale, shift, rows) @ weight.double().T + bias.double()
    check(do.final_layer(x, scale, shift, rows, EPS, weight, bias), expected, dtype)


@both
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_a_token_of_zeros_is_quantised_to_zeros(do, dtype):
    got = do.silu_mul(torch.zeros(3, 128, dtype=torch.bfloat16), TokenFormat(dtype))
    assert torch.equal(got.values.float() * got.scale, torch.zeros(3, 64))


@both
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_lost(do, format, value):
    x = random(3, 256)
    x[1, 7] = value
    got = do.sigmoid_gate(x, torch.zeros(3, 256), format)
    # Whole numbers are finite: the token's scale says it, to all products with the token.
    assert got.scale.isfinite().flatten().tolist() == [True, False, True]


@both
@dtypes
@packs
def test_final_layer(do, dtype, lengths, width):
    rows, channels = rows_of(lengths), 16
    x, (scale, shift) = random(sum(lengths), width, dtype=dtype), tables(lengths, width)
    weight = random(channels, width, dtype=dtype, seed=3) / math.sqrt(width)
    bias = random(channels, dtype=dtype, seed=4)
    expected = exact_norm(x, scale, shift, rows) @ weight.double().T + bias.double()
    check(do.final_layer(x, scale, shift, rows, EPS, weight, bias), expected, dtype)


def euler_case(dtype):
    """Three branches: an image, then another with its negative prompt; text tokens between."""
    row = torch.tensor([0] * 4 + [1] * 5 + [2] * 6, dtype=torch.int32)
    uncond_index = torch.full((15,), -1, dtype=torch.int32)
    uncond_index[2:4] = torch.tensor([2, 3])
    uncond_index[6:9] = torch.tensor([12, 13, 14])
    uncond_index[12:15] = torch.tensor([12, 13, 14])
    return {
        "tokens": random(15, 64),
        "velocity": random(15, 64, dtype=dtype, seed=1),
        "row": row,
        "uncond_index": uncond_index,
        "dt": torch.tensor([-0.1, -0.02, -0.02]),
        "guidance": torch.tensor([0.0, 3.5, 0.0]),
        "guided": torch.full((15, 64), math.nan),
        "non_finite": torch.full((3,), 9, dtype=torch.int32),
    }


@both
@dtypes
def test_euler_step(do, dtype):
    case = euler_case(dtype)
    before, v = case["tokens"].double(), case["velocity"].double()
    expected, guided = before.clone(), torch.zeros(15, 64, dtype=torch.float64)
    guided[2:4] = v[2:4]
    guided[6:9] = v[6:9] + 3.5 * (v[6:9] - v[12:15])
    guided[12:15] = v[12:15]
    expected[2:4] -= 0.1 * guided[2:4]
    expected[6:] -= 0.02 * guided[6:]
    do.euler_step(**case)
    assert torch.allclose(case["tokens"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(case["guided"].double(), guided, rtol=1e-6, atol=1e-6)
    assert case["non_finite"].tolist() == [0, 0, 0]


@both
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_euler_step_tells_which_rows_are_no_longer_finite(do, value):
    case = euler_case(torch.float32)
    case["velocity"][13, 5] = value  # of the negative prompt: its image is not finite either
    case["tokens"][0, 0] = math.nan  # of a text token: means nothing
    do.euler_step(**case)
    assert case["non_finite"].tolist() == [0, 1, 1]


def test_the_rotation_is_its_own_inverse():
    for size in (16, 64, 256):
        matrix = hadamard(size, torch.device("cpu"))
        assert torch.equal(matrix @ matrix, torch.eye(size))
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix, matrix.bfloat16().float())


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_rotation_is_that_of_checkpoint_files(size):
    """The oracle is SGLang's staged transform; Sylvester's matrix would be another one."""
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0))
    assert relative_error(rotate(x, size), rotated(x, size)) <= 1e-6


@pytest.mark.parametrize(
    ("width", "block"), [(6144, 256), (16384, 256), (768, 256), (192, 64), (48, 16), (100, 0)]
)
def test_the_block_of_a_rotation_fits_the_width(width, block):
    assert rotation_block(width) == block


def test_both_kinds_have_the_same_signatures():
    for field in fields(TORCH):
        torchs, tritons = (getattr(do, field.name) for do in (TORCH, TRITON))
        if callable(torchs):
            assert inspect.signature(torchs) == inspect.signature(tritons)
            assert torchs is not tritons
