"""Products of adapters, chosen token by token, in Triton's interpreter and by their references."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction

from krea2_srt.kernels.operations import TORCH, TRITON
from krea2_srt.kernels.quantize import QuantizedTokens, Tokens, quantize_rows
from tests.comparisons import relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # of NaNs put there
]

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, BF16: 8e-3}
"""In the 2-norm, of what is added; in 16 bits it is h that was rounded, and the result."""

both = pytest.mark.parametrize("do", [TORCH, TRITON], ids=lambda do: do.name)

Uses = Sequence[tuple[int, float]]
"""A row's (slot, scale)."""

NONE = (-1, 1.0)
"""A place without an adapter; what is there of a scale counts for nothing."""

# Tokens of each row and its adapters: tiles within a row and across several, rows without adapters
# or tokens, gaps before an adapter, one adapter twice, scales of 0 and below.
MIXED: Sequence[tuple[int, Uses]] = [
    (37, [(0, 0.5)]),
    (70, []),
    (3, [NONE, (2, -1.5), NONE, (0, 1.0)]),
    (0, [(1, 1.0)]),
    (1, [(1, 1.0), (1, 0.25)]),
    (59, [(1, 0.0), (2, 4.0)]),
    (10, [NONE, NONE]),
]
PACKS: dict[str, Sequence[tuple[int, Uses]]] = {
    "one token": [(1, [(0, 1.0)])],
    "one row": [(65, [(0, -0.75)])],
    "four at once": [(20, [(0, 1.0), (1, -1.0), (2, 0.5), (0, 2.0)]), (7, [(2, 1.0)])],
    "none": [(5, []), (9, [])],
    "mixed": MIXED,
}

# Rank and widths of the parts: whole tiles and odd ones.
MATRICES = [
    (16, (40,)),
    (16, (64, 32, 32, 64)),
    (32, (33, 16, 7, 50)),
    (64, (80, 41)),
    (128, (128, 64)),
    (128, (24, 90, 13, 100)),
]
matrices = pytest.mark.parametrize(("rank", "widths"), MATRICES)
packs = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)


@dataclass
class Inputs:
    """Arguments of both products."""

    x: Tokens
    down: Tensor
    up: Tensor
    out: Tensor
    index: Tensor
    slots: Tensor
    scales: Tensor
    starts: tuple[int, ...]

    @property
    def parts(self) -> int:
        return len(self.starts)

    def shrink(self, do) -> Tensor:
        return do.lora_shrink(self.x, self.down, self.index, self.slots, self.parts)

    def expand(self, do, h: Tensor) -> Tensor:
        """A copy of ``out`` with what is added."""
        out = self.out.clone()
        places = (self.index, self.slots, self.scales)
        assert do.lora_expand(out, h, self.up, *places, self.starts) is None
        return out

    def both(self, do) -> Tensor:
        return self.expand(do, self.shrink(do))

    def rows(self, row: int) -> Tensor:
        return self.index == row


def inputs(
    pack: Sequence[tuple[int, Uses]] = MIXED,
    rank: int = 16,
    widths: Sequence[int] = (64, 32),
    width: int = 100,
    dtype: torch.dtype = torch.float32,
    num_slots: int = 3,
    adapters: int = 4,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    padded = [[*uses, *[NONE] * (adapters - len(uses))] for _, uses in pack]
    lengths = torch.tensor([length for length, _ in pack])
    index = torch.arange(len(pack), dtype=torch.int32).repeat_interleave(lengths)
    return Inputs(
        x=random(len(index), width),
        down=random(num_slots, len(widths) * rank, width) * width**-0.5,
        up=random(num_slots, sum(widths), rank) * rank**-0.5,
        out=random(len(index), sum(widths)),
        index=index,
        slots=torch.tensor([[slot for slot, _ in row] for row in padded], dtype=torch.int32),
        scales=torch.tensor([[scale for _, scale in row] for row in padded]),
        starts=tuple(accumulate(widths[:-1], initial=0)),
    )


def exact_h(given: Inputs) -> Tensor:
    """The first products in float64, token by token."""
    x = given.x.dequantized() if isinstance(given.x, QuantizedTokens) else given.x
    h = torch.zeros(len(x), given.slots.shape[1], given.down.shape[1], dtype=torch.float64)
    for token, row in enumerate(given.index.tolist()):
        for adapter, slot in enumerate(given.slots[row].tolist()):
            if slot >= 0:
                h[token, adapter] = given.down[slot].double() @ x[token].double()
    return h


def exact_delta(given: Inputs) -> Tensor:
    """What is added, in float64, token by token."""
    h, rank = exact_h(given), given.up.shape[2]
    delta = torch.zeros(given.out.shape, dtype=torch.float64)
    bounds = [*given.starts, given.out.shape[1]]
    for token, row in enumerate(given.index.tolist()):
        for adapter, slot in enumerate(given.slots[row].tolist()):
            for part, (first, last) in enumerate(pairwise(bounds)):
                if slot >= 0:
                    mine = h[token, adapter, part * rank : (part + 1) * rank]
                    added = given.up[slot, first:last].double() @ mine
                    delta[token, first:last] += given.scales[row, adapter].double() * added
    return delta


def quantized(given: Inputs, format: torch.dtype) -> Inputs:
    assert isinstance(given.x, Tensor)
    return replace(given, x=quantize_rows(given.x.float(), format))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def check(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype
    assert torch.isfinite(got).all()
    if expected.any():
        assert relative_error(got, expected) <= TOLERANCE[dtype]
    else:
        assert not got.any()


@both
@matrices
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_products_of_a_mixed_pack(do, dtype, rank, widths):
    given = inputs(rank=rank, widths=widths, dtype=dtype)
    check(given.shrink(do), exact_h(given), dtype)
    delta = exact_delta(given)
    # From zero on: the rounding of a larger output would hide that of what is added.
    check(replace(given, out=torch.zeros_like(given.out)).both(do), delta, dtype)
    check(given.both(do), given.out.double() + delta, dtype)


@both
@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_products_of_any_pack(do, dtype, pack):
    given = inputs(pack, dtype=dtype)
    check(given.shrink(do), exact_h(given), dtype)
    check(replace(given, out=torch.zeros_like(given.out)).both(do), exact_delta(given), dtype)


@packs
def test_triton_gives_what_its_reference_gives(pack):
    given = inputs(pack, rank=32, widths=(33, 16, 7, 50))
    h = given.shrink(TORCH)
    assert (given.shrink(TRITON) - h).abs().max() <= 1e-5 * max(h.abs().max(), 1e-30)
    assert relative_error(given.expand(TRITON, h), given.expand(TORCH, h)) <= 1e-5


@both
@pytest.mark.parametrize("format", [E4M3, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_quantised_tokens(do, format, dtype):
    given = quantized(inputs(rank=16, widths=(48, 20), dtype=dtype), format)
    check(given.shrink(do), exact_h(given), dtype)
    check(replace(given, out=torch.zeros_like(given.out)).both(do), exact_delta(given), dtype)


@both
@pytest.mark.parametrize(("num_slots", "adapters"), [(1, 1), (2, 3), (5, 4)])
def test_any_number_of_slots_and_of_adapters_of_a_row(do, num_slots, adapters):
    pack = [(9, [(num_slots - 1, 0.5)]), (2, [(0, 1.0)] * adapters), (4, [])]
    given = inputs(pack, num_slots=num_slots, adapters=adapters)
    check(given.both(do), given.out + exact_delta(given), torch.float32)


@both
@pytest.mark.parametrize("width", [32, 64, 160, 513])
def test_any_width(do, width):
    given = inputs([(6, [(0, 1.0)])], width=width)
    check(given.shrink(do), exact_h(given), torch.float32)


@both
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_token_without_adapters_keeps_its_bits(do, dtype):
    given = inputs(dtype=dtype)
    given.out.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    given.out[:, 0] = -0.0  # 0 added would make it 0
    before = given.out.clone()
    # Some have slots, but no strength.
    given.scales[5] = 0.0
    got = given.both(do)
    for row in (1, 5, 6):
        assert given.rows(row).any()
        assert torch.equal(bits(got[given.rows(row)]), bits(before[given.rows(row)]))
    assert not torch.equal(bits(got), bits(before))


@both
def test_h_is_0_where_there_is_no_adapter(do):
    given = inputs()
    given.x[given.rows(1)] = torch.nan
    h = given.shrink(do)
    empty = (given.slots < 0)[given.index.long()]
    assert empty.any()
    assert not h[empty].any()


@both
@pytest.mark.parametrize("format", [None, E4M3], ids=str)
def test_what_an_unused_slot_holds_reaches_no_token(do, format):
    given = inputs(num_slots=4)
    expected = given.out + exact_delta(given)
    given.down[3] = given.up[3] = torch.nan
    if format is not None:
        given = quantized(given, format)
        expected = given.out + exact_delta(given)
    check(given.both(do), expected, torch.float32)


@both
def test_an_adapter_with_scale_0_adds_nothing_whatever_it_holds(do):
    given = inputs([(9, [(1, 0.0), (2, 4.0)]), (3, [(1, 0.0)])])
    given.up[1] = 0.0
    expected = given.out + exact_delta(given)
    given.up[1] = torch.inf
    check(given.both(do), expected, torch.float32)


@both
@pytest.mark.parametrize("part", ["tokens", "adapter", "output"])
def test_nans_of_one_row_reach_no_other(do, part):
    # All in one tile.
    pack: Sequence[tuple[int, Uses]] = [(9, [(0, 1.0)]), (5, [(1, 1.0)]), (7, []), (11, [(2, 0.5)])]
    given = inputs(pack)
    expected = given.both(do)
    if part == "tokens":
        assert isinstance(given.x, Tensor)
        given.x[given.rows(1)] = torch.nan
    elif part == "adapter":
        given.down[1] = given.up[1] = torch.inf
    else:
        given.out[given.rows(1)] = torch.nan
    got = given.both(do)
    sound = ~given.rows(1)
    assert not torch.isfinite(got[~sound]).all()
    assert torch.equal(got[sound], expected[sound])


@both
def test_a_row_may_come_again_later(do):
    # As the padding of a graph, which is of the first row.
    given = inputs([(9, [(0, 1.0)]), (75, [(1, 1.0)]), (7, [])])
    given.index = torch.cat([given.index[:-16], torch.zeros(16, dtype=torch.int32)])
    check(given.both(do), given.out + exact_delta(given), torch.float32)


@pytest.mark.parametrize("format", [None, E4M3], ids=str)
def test_a_pack_gives_what_its_rows_give_alone(format):
    given = inputs(rank=32, dtype=BF16)
    if format is not None:
        given = quantized(given, format)
    together, x = given.both(TRITON), given.x
    for row in (0, 2, 5):
        mine = given.rows(row)
        tokens: Any = (
            QuantizedTokens(x.values[mine], x.scale[mine])
            if isinstance(x, QuantizedTokens)
            else x[mine]
        )
        alone = replace(given, x=tokens, out=given.out[mine], index=given.index[mine])
        assert torch.equal(alone.both(TRITON), together[mine])


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pack=st.lists(
        st.tuples(
            st.integers(0, 90),
            st.lists(
                st.tuples(st.integers(-1, 2), st.sampled_from([0.0, 1.0, -2.0, 0.3])), max_size=4
            ),
        ),
        min_size=1,
        max_size=5,
    ).filter(lambda pack: any(length for length, _ in pack)),
    widths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    rank=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**31),
)
def test_random_packs_and_parts(pack, widths, rank, seed):
    some = inputs(pack, rank=rank, widths=widths, width=48, seed=seed)
    h = some.shrink(TORCH)
    assert torch.allclose(some.shrink(TRITON), h, rtol=1e-5, atol=1e-5)
    got, expected = some.expand(TRITON, h), some.expand(TORCH, h)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_launches_read_nothing_from_the_device(monkeypatch):
    """A graph that was captured with some slots serves all others."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, grid, **__: grids.append(grid))
    real = inputs(dtype=BF16)
    # Its tensors have no values that a program could ask for.
    with FakeTensorMode() as mode:
        fake = Inputs(
            **{
                name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in vars(real).items()
            }
        )
        fake.both(TRITON)
        quantized_x = QuantizedTokens(
            torch.empty(fake.x.shape, dtype=E4M3), torch.empty(len(fake.x), 1)
        )
        replace(fake, x=quantized_x).shrink(TRITON)
    tiles = -(-len(real.index) // 64)
    assert grids == [(1, tiles), (3, tiles), (1, tiles)]


def test_parts_that_do_not_fit_are_refused():
    given = inputs(widths=(64, 32))
    with pytest.raises(AssertionError):
        replace(given, starts=(0, 32, 64)).both(TRITON)
    with pytest.raises(AssertionError):
        replace(given, starts=(8, 64)).both(TRITON)
