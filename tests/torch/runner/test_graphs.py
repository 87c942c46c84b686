"""Graphs without a GPU: buckets, buffers and replays, with a recorder in place of CUDA's."""

import math
from dataclasses import replace
from itertools import pairwise
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.engine.cost import roofline
from krea2_srt.request import ImageRequest
from krea2_srt.runner.graphs import (
    FEW_TOKENS,
    MAX_PADDING,
    Buckets,
    Eager,
    StepGraphs,
    token_buckets,
)
from krea2_srt.runner.packing import ForwardBatch, PackCache
from tests.comparisons import CPU, relative_error
from tests.torch.runner.recorded_graph import record

MAX_TOKENS = 700


def device_attention(q, k, v, segments):
    """Attention that knows segments from tensors alone, as a captured one must."""
    assert segments.spans == ()
    places = torch.arange(len(q), dtype=torch.int32, device=q.device)
    segment = torch.searchsorted(segments.cu_seqlens, places, right=True)
    mask = segment[:, None] == segment[None, :]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


class Captures:
    """Counts captures; fails those it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    def __call__(self, function):
        self.count += 1
        if self.error is not None:
            raise self.error
        return record(function)


@pytest.fixture
def captures() -> Captures:
    return Captures()


@pytest.fixture
def graphs(runner, captures) -> StepGraphs:
    return StepGraphs(runner.dit, device_attention, captures, MAX_TOKENS, max_segments=8)


@pytest.fixture(scope="module")
def packs(runner) -> PackCache:
    return PackCache(runner.dit.config, CPU, 2**20)


def sequences(runner, *images, steps=4):
    """Sequences of (prompt, width, height, guidance), the later ones some steps ahead."""
    found = []
    for number, (prompt, width, height, guidance) in enumerate(images):
        image = ImageRequest(prompt, width, height, steps + number, guidance, "blurry", number)
        found.append(runner.start(image, runner.encode(image.prompts)))
    return found


def copies(those):
    return [replace(s, sequence=replace(s.sequence)) for s in those]


def step(graphs, packs, those, steps=1):
    batch = ForwardBatch.of(those)
    with torch.inference_mode():
        flags = graphs.step(batch, packs.get(batch.shapes), steps)
    return None if flags is None else flags.tolist()


def seen(graphs, packs, those):
    """Other pictures of the same sizes come before."""
    step(graphs, packs, copies(those))


def stepped(graphs, packs, those, steps=1):
    flags = step(graphs, packs, those, steps)
    assert flags is not None
    return those


ONE = [("a cat", 64, 48, 0.0)]
MIX = [("a dog in the rain", 64, 64, 0.0), ("x", 16, 16, 3.5), ("", 96, 32, 0.0)]


def test_a_bucket_is_captured_with_its_second_picture(runner, graphs, packs, captures):
    those = sequences(runner, *ONE)
    for _ in range(2):
        assert step(graphs, packs, those) is None
    assert captures.count == 0
    assert those[0].step == 0
    others = sequences(runner, *ONE)
    for _ in range(2):
        assert step(graphs, packs, others) == [0]
    assert captures.count == 1
    assert others[0].step == 2
    assert step(graphs, packs, those) == [0]
    assert captures.count == 1


def test_a_picture_that_goes_on_in_another_pack_is_not_a_second_one(
    runner, graphs, packs, captures
):
    first, second, third = sequences(runner, *ONE * 3)
    for those in ([first, second], [second, third], [first, third]):
        assert step(graphs, packs, those) is None
    assert captures.count == 0
    assert step(graphs, packs, [third, *copies([third])]) is not None


@pytest.mark.parametrize("images", [ONE, MIX, MIX[::-1]])
def test_a_replay_is_the_eager_step(runner, graphs, packs, images):
    eager = sequences(runner, *images)
    graphed = copies(eager)
    seen(graphs, packs, graphed)
    for _ in range(3):
        runner.step(eager)
        stepped(graphs, packs, graphed)
        for got, expected in zip(graphed, eager, strict=True):
            assert got.step == expected.step
            assert relative_error(got.tokens, expected.tokens) <= 1e-5


def test_one_graph_serves_all_packs_of_its_bucket(runner, graphs, packs, captures):
    # Other sizes, prompts, steps and orders than it was captured with.
    for images in (
        [("a cat", 64, 64, 0.0), ("a dog in the rain", 32, 48, 0.0)],
        [("one more dog", 48, 32, 0.0), ("cats", 64, 64, 0.0)],
        [("the rain, again", 80, 48, 0.0), ("", 32, 32, 0.0)],
    ):
        eager = sequences(runner, *images)
        graphed = copies(eager)
        if not captures.count:
            seen(graphs, packs, graphed)
        runner.step(eager)
        stepped(graphs, packs, graphed)
        for got, expected in zip(graphed, eager, strict=True):
            assert relative_error(got.tokens, expected.tokens) <= 1e-5
    assert captures.count == 1


def test_a_replay_is_to_the_bit_what_the_same_forward_gives_uncaptured(runner, packs):
    def uncaptured(function):
        return function

    found = []
    for capture in (record, uncaptured):
        graphs = StepGraphs(runner.dit, device_attention, capture, MAX_TOKENS)
        those = sequences(runner, *MIX)
        seen(graphs, packs, those)
        for _ in range(2):
            stepped(graphs, packs, those)
        found.append([s.tokens for s in those])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_all_steps_of_a_lone_sequence_are_one_graph(runner, graphs, packs, captures):
    eager = sequences(runner, *ONE)
    for _ in range(4):
        runner.step(eager)
    for number in range(3):
        graphed = sequences(runner, *ONE)
        flags = step(graphs, packs, graphed, steps=4)
        if number == 0:
            assert flags is None
            continue
        assert flags == [0]
        assert graphed[0].done
        assert relative_error(graphed[0].tokens, eager[0].tokens) <= 1e-5
    assert captures.count == 1


def test_what_lay_in_the_buffers_before_does_not_matter(runner, graphs, packs):
    clean = sequences(runner, *MIX)
    seen(graphs, packs, clean)
    stepped(graphs, packs, clean)
    broken = sequences(runner, *MIX)
    for s in broken:
        s.tokens = s.tokens * math.nan
    assert all(step(graphs, packs, broken)[branch] for branch in (0, 1, 3))
    # The largest pack that fits, of NaNs: all of the buffers are poisoned now.
    again = sequences(runner, *MIX)
    stepped(graphs, packs, again)
    for got, expected in zip(again, clean, strict=True):
        assert torch.equal(got.tokens, expected.tokens)


def test_only_the_non_finite_sequence_is_reported(runner, graphs, packs):
    those = sequences(runner, *MIX)
    seen(graphs, packs, those)
    those[1].sequence.image = replace(those[1].sequence.image, guidance=math.inf)
    flags = step(graphs, packs, those)
    assert [id(s) for s in ForwardBatch.of(those).non_finite(flags)] == [id(those[1])]


def test_velocities_are_kept_for_those_who_want_them(runner, graphs, packs):
    eager = sequences(runner, *MIX)
    graphed = copies(eager)
    for those in (eager, graphed):
        those[1].sequence.wants_previews = True
    seen(graphs, packs, graphed)
    runner.step(eager)
    stepped(graphs, packs, graphed)
    assert graphed[0].velocity is None
    assert relative_error(graphed[1].velocity, eager[1].velocity) <= 1e-5
    kept = graphed[1].velocity.clone()
    graphed[1].sequence.wants_previews = False
    stepped(graphs, packs, graphed)
    assert graphed[1].velocity is None
    assert torch.isfinite(kept).all()


def test_a_bucket_that_cannot_be_captured_runs_without_and_says_so_once(
    runner, graphs, packs, captures, caplog
):
    captures.error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    those = sequences(runner, *ONE)
    seen(graphs, packs, those)
    before = those[0].tokens.clone()
    for _ in range(4):
        assert step(graphs, packs, those) is None
    assert torch.equal(those[0].tokens, before)
    assert captures.count == 1
    assert len([r for r in caplog.records if "step graphs off" in r.message]) == 1
    ((size, reason),) = graphs.failures.items()
    assert size == "32 tokens in up to 2 segments of up to 32"
    assert reason.endswith("not permitted when stream is capturing")
    assert not graphs.prepare(ForwardBatch.of(those), packs.get(ForwardBatch.of(those).shapes))
    # It has nothing to do with memory, so there is no second try.
    graphs.record.memory_freed()
    assert step(graphs, packs, those) is None
    assert captures.count == 1
    captures.error = None
    other = sequences(runner, *MIX)
    seen(graphs, packs, other)
    stepped(graphs, packs, other)


def test_a_bucket_that_found_no_memory_is_tried_again_when_there_is_some(
    runner, graphs, packs, captures, caplog
):
    captures.error = torch.OutOfMemoryError("CUDA out of memory")
    those = sequences(runner, *ONE)
    seen(graphs, packs, those)
    for _ in range(2):
        assert step(graphs, packs, those) is None
    assert captures.count == 1
    graphs.record.memory_freed()
    assert step(graphs, packs, those) is None
    assert captures.count == 2
    assert len([r for r in caplog.records if "step graphs off" in r.message]) == 1
    captures.error = None
    graphs.release()  # gives memory back too
    stepped(graphs, packs, those)
    assert not graphs.failures


def test_what_ran_without_a_graph_has_a_reason(runner, graphs, packs, captures):
    those, large = sequences(runner, *ONE), sequences(runner, ("a cat", 512, 512, 0.0))
    step(graphs, packs, those)
    step(graphs, packs, those)
    step(graphs, packs, large)
    captures.error = RuntimeError("CUDA error")
    other = copies(those)
    step(graphs, packs, other)
    step(graphs, packs, other)
    eager = {Eager.FIRST_USE: 2, Eager.TOO_LARGE: 1, Eager.FAILED: 2, Eager.ADAPTERS: 0}
    assert graphs.record.eager == eager
    captures.error = None
    lone = sequences(runner, *ONE)
    assert step(graphs, packs, lone, steps=4) is None
    assert sum(graphs.record.eager.values()) == 5, "what it does step by step is counted, not this"
    assert step(graphs, packs, copies(lone), steps=4) == [0]
    assert graphs.record.replayed == 1


def test_too_large_packs_have_no_graph(runner, graphs, packs, captures):
    many = sequences(runner, *ONE * 8)
    large = sequences(runner, ("a cat", 512, 512, 0.0))
    for those in (many, large):
        for _ in range(3):
            assert step(graphs, packs, those) is None
    assert captures.count == 0


def test_too_long_schedules_have_no_graph(runner, graphs, packs, captures):
    those = sequences(runner, *ONE, steps=9)
    for _ in range(3):
        assert step(graphs, packs, those, steps=9) is None
    assert captures.count == 0
    for _ in range(2):
        flags = step(graphs, packs, sequences(runner, *ONE, steps=8), steps=8)
    assert flags == [0]


def test_the_graph_used_last_longest_ago_makes_room(runner, captures, packs):
    graphs = StepGraphs(runner.dit, device_attention, captures, MAX_TOKENS, max_graphs=2)
    shapes = [("a", 16 * side, 64, 0.0) for side in (4, 10, 16)]
    for image in shapes:
        those = sequences(runner, image)
        seen(graphs, packs, those)
        stepped(graphs, packs, those)
    assert len(graphs) == 2
    assert captures.count == 3
    stepped(graphs, packs, sequences(runner, shapes[2]))
    assert captures.count == 3
    stepped(graphs, packs, sequences(runner, shapes[0]))
    assert captures.count == 4


def test_a_whole_schedule_takes_the_room_of_its_steps(runner, captures, packs):
    graphs = StepGraphs(runner.dit, device_attention, captures, MAX_TOKENS, max_graphs=4)
    shapes = [("a", 16 * side, 64, 0.0) for side in (4, 10, 16)]
    for image in shapes:
        for _ in range(2):
            flags = step(graphs, packs, sequences(runner, image))
        assert flags is not None
    assert len(graphs) == 3
    for _ in range(2):
        flags = step(graphs, packs, sequences(runner, shapes[0], steps=3), steps=3)
    assert flags is not None
    assert len(graphs) == 2


def test_graphs_are_captured_anew_after_a_release(runner, graphs, packs, captures):
    those = sequences(runner, *ONE)
    seen(graphs, packs, those)
    stepped(graphs, packs, those)
    graphs.release()
    assert len(graphs) == 0
    stepped(graphs, packs, those)
    assert captures.count == 2


def test_prepared_buckets_need_no_uses(runner, graphs, packs, captures):
    those = sequences(runner, *MIX)
    before = [s.tokens.clone() for s in those]
    batch = ForwardBatch.of(those)
    with torch.inference_mode():
        assert graphs.prepare(batch, packs.get(batch.shapes))
        assert graphs.prepare(batch, packs.get(batch.shapes))
    assert captures.count == 1
    assert all(torch.equal(s.tokens, t) for s, t in zip(those, before, strict=True))
    stepped(graphs, packs, those)


def test_the_largest_graph_comes_first_and_once(runner, graphs, packs, captures):
    assert graphs.prime()
    assert graphs.prime()
    assert captures.count == 1
    (context,) = runner.encode(["a cat"])
    largest = sequences(runner, ("a cat", 16, 16 * (MAX_TOKENS - len(context)), 0.0))
    assert largest[0].num_tokens == MAX_TOKENS
    stepped(graphs, packs, largest)
    assert captures.count == 1
    captures.error = RuntimeError("CUDA error")
    graphs.release()
    assert not graphs.prime()


def test_what_can_be_made_anew_is_given_back_and_made_anew(runner, graphs, packs):
    those = sequences(runner, *MIX)
    again = copies(those)
    seen(graphs, packs, those)
    stepped(graphs, packs, those)
    buffers = ref(graphs._buffers)
    graphs.release()
    assert buffers() is None
    stepped(graphs, packs, again)
    for got, expected in zip(again, those, strict=True):
        assert torch.equal(got.tokens, expected.tokens)


def test_a_limit_gives_the_memory_of_larger_packs_back(runner, graphs, packs, captures):
    those, large = sequences(runner, *ONE), sequences(runner, ("a cat", 320, 320, 0.0))
    for some in (those, large):
        seen(graphs, packs, some)
        stepped(graphs, packs, some)
    graphs.limit_to(200)
    assert len(graphs) == 0
    assert len(graphs._buffers.tokens) == 200
    assert step(graphs, packs, large) is None
    stepped(graphs, packs, those)


# Buckets.


def test_the_ladder_rises_to_exactly_its_end():
    for most in (1, 31, 32, 33, 255, 256, 257, 300, 4160, 16448, 33792):
        ladder = token_buckets(most)
        assert ladder[-1] == most
        assert all(a < b for a, b in pairwise(ladder))


def test_padding_costs_less_than_three_percent_of_any_step():
    cost = roofline()
    buckets = Buckets(16448, 64)
    for tokens in range(1, 16449):
        key = buckets.key([tokens])
        assert key.tokens >= tokens
        padded = cost.step([tokens, key.tokens - tokens])
        assert padded < cost.step([tokens]) * (1 + MAX_PADDING)
        if tokens > FEW_TOKENS + 24:  # where arithmetic takes over
            assert key.tokens < tokens * (1 + MAX_PADDING)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=70))
def test_a_key_holds_its_pack(lengths):
    key = Buckets(5000, 64).key(lengths)
    if key is None:
        assert sum(lengths) > 5000 or len(lengths) > 63
        return
    assert key.tokens >= sum(lengths)
    assert key.segments > len(lengths)
    assert key.longest >= max(lengths)
    # The padding is a segment too.
    assert key.longest >= key.tokens - sum(lengths)


def test_the_number_of_graphs_for_lone_sequences_is_small():
    buckets = Buckets(16448, 64)
    assert len({buckets.key([tokens]) for tokens in range(1, 16449)}) <= 200


def test_all_steps_of_a_schedule_are_done_or_none(runner, monkeypatch):
    (sequence,) = sequences(runner, *ONE)
    before, run = sequence.tokens, runner._run
    failures = iter([False, False, True])

    def fails_at_the_third(those):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(those)

    monkeypatch.setattr(runner, "_run", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        runner.launch([sequence], 4)
    assert (sequence.step, sequence.tokens) == (0, before)
    assert runner.step([sequence], 4) == []
    assert sequence.done
