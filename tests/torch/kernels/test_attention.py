"""Attention with its gate in the epilogue, in Triton's interpreter, against float64."""

import math
from itertools import pairwise

import pytest
import torch

from krea2_srt.kernels import attention
from krea2_srt.kernels.attention import AttentionTiles, gated_attention, gated_attention_triton
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.attention import FusedGateAttention, sdpa_attention
from krea2_srt.model.layers import GatedAttention, plain_linears
from krea2_srt.model.pack import Segments
from krea2_srt.runner import attention_trial
from krea2_srt.runner.attention_backends import TRITON_GATED, known_backends

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HEAD_DIM = 16
TILES = AttentionTiles(queries=16, keys=16)
"""Small, so that a few tokens make tiles of all kinds."""

# An empty one first, in the middle and last; one token; less than a tile, whole ones, and more.
PACKS = [(1,), (0, 5, 0, 1), (16, 32), (37, 0, 48, 1, 15, 17, 0), (65,)]

both = pytest.mark.parametrize(
    "attend", [gated_attention, gated_attention_triton], ids=["torch", "triton"]
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "tiles_of", lambda device: TILES)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no program writes is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def inputs(lengths, heads=4, kv_heads=1, dtype=torch.float32):
    """q, k, v and gate as views of a fused projection, and the segments' offsets."""
    generator = torch.Generator().manual_seed(sum(lengths))
    widths = [n * HEAD_DIM for n in (heads, kv_heads, kv_heads, heads)]
    fused = torch.randn(sum(lengths), sum(widths), generator=generator).to(dtype)
    *qkv, gate = fused.split(widths, dim=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return *(x.unflatten(1, (-1, HEAD_DIM)) for x in qkv), gate, offsets


def exact(q, k, v, gate, offsets):
    """In float64, head by head, segment by segment."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        for start, end in pairwise(offsets.tolist()):
            some = slice(start, end)
            scores = q[some, head].double() @ k[some, kv_head].double().T / HEAD_DIM**0.5
            out[some, head] = scores.softmax(-1) @ v[some, kv_head].double()
    if gate is None:
        return out
    return out * torch.sigmoid(gate.double()).unflatten(1, (-1, HEAD_DIM))


def check(got, expected, dtype):
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert torch.isfinite(got.float()).all()
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]


@both
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_attention_equals_float64(attend, lengths, gated):
    q, k, v, gate, offsets = inputs(lengths)
    gate = gate if gated else None
    check(attend(q, k, v, gate, offsets), exact(q, k, v, gate, offsets), torch.float32)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (2, 2)])
def test_attention_in_16_bits(attend, dtype, heads, kv_heads):
    case = inputs((37, 0, 3), heads, kv_heads, dtype)
    check(attend(*case), exact(*case), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 201, 14))
def test_attention_of_many_lengths(length):
    case = inputs((length, 201 - length), heads=1, dtype=torch.bfloat16)
    check(gated_attention_triton(*case), exact(*case), torch.bfloat16)


@pytest.mark.slow
def test_attention_with_the_tiles_that_serve(monkeypatch):
    for tiles in (attention.SMALL, attention.LARGE):
        monkeypatch.setattr(attention, "tiles_of", lambda device, tiles=tiles: tiles)
        case = inputs((129, 0, 333, 77))
        check(gated_attention_triton(*case), exact(*case), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_other_segments_do_not_matter():
    """Nor what is not finite in them: nobody's picture may depend on a neighbour's."""
    q, k, v, gate, offsets = inputs((20, 21, 19))
    expected = gated_attention_triton(q, k, v, gate, offsets)[20:41].clone()
    for x in (q, k, v, gate):
        x[:20] = math.nan
        x[41:] = math.inf
    assert torch.equal(gated_attention_triton(q, k, v, gate, offsets)[20:41], expected)


def test_large_scores_overflow_nothing():
    q, k, v, gate, offsets = inputs((40, 3))
    q *= 1e4
    check(
        gated_attention_triton(q, k, v, gate, offsets),
        exact(q, k, v, gate, offsets),
        torch.float32,
    )


@pytest.mark.slow
def test_every_segment_has_the_tiles_that_it_needs():
    """However lengths and tiles fall: the kernel finds a tile's segment from the offsets alone."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        lengths = torch.randint(0, 40, (6,), generator=generator).tolist()
        q, k, v, gate, offsets = inputs((*lengths, 1), heads=1)
        check(
            gated_attention_triton(q, k, v, gate, offsets),
            exact(q, k, v, gate, offsets),
            torch.float32,
        )


def layer(head_dim, format=None):
    layer = GatedAttention(64, 4, 1, head_dim, 1e-5, plain_linears(torch.float32))
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    layer.out.format = format
    return layer


def test_a_block_gates_in_the_kernel_where_attention_can(monkeypatch):
    """And only there; with the same result."""
    used = []

    def gated(q, k, v, gate, segments):
        used.append("gated")
        return TRITON_GATED.attend_gated(q, k, v, gate, segments)

    fused = FusedGateAttention(TRITON_GATED.attend, gated)
    segments = Segments.of((20, 0, 21), torch.device("cpu"))
    x = torch.randn(41, 64, generator=torch.Generator().manual_seed(3))
    block = layer(HEAD_DIM)
    expected = block(x, sdpa_attention, segments)
    assert used == []
    assert torch.allclose(block(x, fused, segments), expected, atol=1e-5)
    assert used == ["gated"]


def test_a_gate_before_8_bits_is_quantised_with(monkeypatch):
    """Which takes as many bytes as to quantise what attention has gated."""
    fused = FusedGateAttention(sdpa_attention, lambda *args: pytest.fail("gated twice"))
    read = []
    block = layer(HEAD_DIM, TokenFormat())
    monkeypatch.setattr(block.out, "forward", lambda x, deltas: read.append(x))
    block(torch.ones(3, 64), fused, Segments.of((3,), torch.device("cpu")))
    assert isinstance(read[0], QuantizedTokens)


def test_the_kernel_passes_the_trial_of_back_ends(monkeypatch):
    for name, heads in (("HEADS", 2), ("KV_HEADS", 1), ("PROJECTION", 6), ("LENGTHS", (6, 33))):
        monkeypatch.setattr(attention_trial, name, heads)
    backend = known_backends()["triton_gated"]
    assert backend.capturable
    fault = attention_trial.trial_fault(backend, torch.device("cpu"), torch.bfloat16)
    assert fault == ""
    monkeypatch.setattr(attention, "_LOG2_E", 1.0)
    fault = attention_trial.trial_fault(backend, torch.device("cpu"), torch.bfloat16)
    assert fault.startswith("differs from float64")
