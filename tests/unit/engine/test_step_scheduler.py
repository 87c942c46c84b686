import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import State
from krea2_srt.engine.pack_builder import MIN_GAIN
from krea2_srt.engine.policy import STRETCH
from krea2_srt.engine.step_scheduler import MAX_ENCODED_TOGETHER
from tests.unit.engine.fakes import H200, Harness, image

ROOMY = CostModel(floor=0, launch=20, per_token=0.001, per_square=0, encode_per_token=0.001)
"""A machine where a pack takes about as long as one sequence."""

T256, T2048 = 256 + 64, 128 * 128 + 64


def order(harness: Harness) -> list[str]:
    """Requests in the order in which they ended."""
    return list(harness.ended)


def pack_sizes(harness: Harness) -> list[int]:
    return [len(ran.sequences) for ran in harness.steps()]


# The order.


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("srpt", ["small", "medium", "large"]),
        ("edf", ["medium", "large", "small"]),
    ],
)
def test_the_policy_orders_requests(policy, expected):
    harness = Harness(EngineConfig(policy=policy))
    # Under `edf` the small one is due, as `srpt` says, after the deadlines of the others.
    harness.submit(1024, request_id="large", deadline_s=2.4)
    harness.clock.advance(1)
    harness.submit(512, request_id="medium", deadline_s=2.0)
    harness.clock.advance(1)
    small = harness.submit(256, request_id="small", deadline_s=30)
    assert 2.4 < small.arrival + STRETCH * small.remaining_ms / 1e3 < 30
    harness.run()
    assert order(harness) == expected
    assert harness.engine.counters.done == 3
    harness.check_empty()


@pytest.mark.parametrize("policy", ["srpt", "edf"])
def test_priority_goes_before_the_policy(policy):
    harness = Harness(EngineConfig(policy=policy))
    harness.submit(256, request_id="small")
    harness.submit(1024, request_id="large", priority=2)
    harness.run()
    assert order(harness) == ["large", "small"]


def test_requests_of_equal_urgency_keep_the_order_of_their_arrival():
    harness = Harness(cost=H200)
    for _ in range(5):
        harness.submit(512)
    harness.run()
    assert order(harness) == [f"r{i}" for i in range(5)]


def test_the_most_urgent_request_is_decoded_before_others_step():
    harness = Harness()
    first = harness.submit(256, steps=1)
    harness.submit(256, steps=1)
    harness.run_until(first)
    assert [(ran.kind, ran.requests) for ran in harness.ran] == [
        ("encode", ["r0", "r1"]),
        ("step", ["r0"]),
        ("decode", ["r0"]),
    ]


def test_overlapped_decodes_let_others_step_at_once():
    harness = Harness(overlaps_decodes=True)
    harness.submit(2048, steps=1)
    harness.turn()
    other = harness.submit(256, steps=2)
    harness.run()
    assert {ran.kind for ran in harness.ran} == {"encode", "step"}
    starts = [ran.start for ran in harness.steps(other)]
    assert starts[1] == pytest.approx(starts[0] + H200.step([T256]) / 1e3)
    harness.check_empty()


def test_a_sequence_that_is_decoded_beside_it_does_not_keep_a_waiting_request_from_the_device():
    harness = Harness(overlaps_decodes=True)
    first = harness.submit(2048, steps=1)
    harness.turns(5)
    assert first.sequences[0].state is State.DECODING
    other = harness.submit(1024)
    assert harness.turn()
    assert other.state is State.DENOISING
    harness.run()
    harness.check_empty()


# Packs.


def test_a_pack_takes_sequences_of_any_size_and_step():
    harness = Harness(cost=ROOMY)
    harness.submit(512, steps=8)
    harness.turns(4)
    harness.submit((256, 1024), steps=3, guidance=3.0)
    harness.submit((64, 16), steps=4)
    harness.turns(2)
    together = harness.ran[-1]
    assert sorted(together.requests) == ["r0", "r1", "r2"]
    assert {s.request.id: s.step for s in together.sequences} == {"r0": 4, "r1": 1, "r2": 1}


def test_a_pack_holds_at_most_the_budget_of_tokens():
    harness = Harness(EngineConfig(max_pack_tokens=10 * T256 + 5), ROOMY)
    harness.submit(256, num_images=24)
    harness.turns(2)
    assert pack_sizes(harness) == [10]
    smaller = harness.submit(16, steps=2, prompt="")
    harness.run_until(smaller)
    fit = harness.steps(smaller)[-1]
    assert fit.sequences[0] is smaller.sequences[0]
    assert sum(sum(s.tokens) for s in fit.sequences) <= 10 * T256 + 5
    harness.run()
    assert max(pack_sizes(harness)) <= 11


def test_a_sequence_that_does_not_fit_makes_room_for_a_smaller_one_behind_it():
    harness = Harness(EngineConfig(max_pack_tokens=2 * T256), ROOMY)
    for priority, size in ((0, 256), (0, 512), (-1, 256)):
        harness.submit(size, priority=priority)
    harness.turns(2)
    assert harness.ran[-1].requests == ["r0", "r2"]


def test_a_sequence_above_the_budget_runs_alone():
    harness = Harness(EngineConfig(max_pack_tokens=T256), ROOMY)
    harness.submit(1024, num_images=2)
    harness.run()
    assert set(pack_sizes(harness)) == {1}
    harness.check_empty()


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_pack_holds_at_most_so_many_sequences(most):
    harness = Harness(EngineConfig(max_pack_sequences=most), ROOMY)
    harness.submit(256, num_images=3 * most - 1)
    harness.run()
    assert pack_sizes(harness)[:16] == [most] * 16
    assert max(pack_sizes(harness)) == most


def test_a_pack_takes_at_most_a_turn():
    cost = CostModel(floor=0, launch=50, per_token=0.1, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=200), cost)
    harness.submit(256, num_images=12)
    harness.run()
    assert max(pack_sizes(harness)) == int(150 / (0.1 * T256))
    assert max(ran.ms for ran in harness.ran) <= 200


@pytest.mark.parametrize("share", [MIN_GAIN - 0.02, MIN_GAIN + 0.02])
def test_sequences_share_a_forward_only_for_a_gain(share):
    """What company saves is the launch: that share of a step of one sequence alone."""
    cost = CostModel(floor=0, launch=share * T256, per_token=1 - share, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=10000), cost)
    harness.submit(256, num_images=4)
    harness.turns(2)
    assert pack_sizes(harness) == [4 if share > MIN_GAIN else 1]


def test_the_floor_of_reading_the_weights_is_shared():
    harness = Harness()
    harness.submit(64, num_images=8, prompt="")
    harness.run()
    assert set(pack_sizes(harness)) == {8}
    assert all(ran.ms == pytest.approx(24.3 / 4.3) for ran in harness.steps())


def test_a_newcomer_of_the_same_size_joins_the_pack_that_is_under_way():
    """Where company is nearly free: waiting for the first to finish would double its latency."""
    harness = Harness(cost=ROOMY)
    first = harness.submit(256)
    harness.turns(4)
    second = harness.submit(256)
    harness.run()
    assert any(first.id in ran.requests for ran in harness.steps(second))
    assert harness.latency(second) <= 1.3 * harness.latency(first)


def test_newcomers_that_gain_by_joining_are_encoded_together():
    harness = Harness(cost=ROOMY)
    first = harness.submit(256)
    harness.turns(3)
    others = [harness.submit(256, steps=steps) for steps in (8, 50, 20)]
    harness.turns(2)
    assert all(other.key > first.key for other in others)
    assert [(ran.kind, ran.requests) for ran in harness.ran[-2:]] == [
        ("encode", ["r1", "r3", "r2"]),
        ("step", ["r0", "r1", "r3", "r2"]),
    ]
    harness.run()
    harness.check_empty()


@pytest.mark.parametrize("share", [MIN_GAIN - 0.02, MIN_GAIN + 0.02])
def test_a_newcomer_joins_only_where_company_pays(share):
    cost = CostModel(floor=0, launch=share * T256, per_token=1 - share, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=10000), cost)
    first = harness.submit(256)
    harness.turns(4)
    second = harness.submit(256)
    harness.run_until(first)
    assert second.state is (State.DENOISING if share > MIN_GAIN else State.WAITING)
    assert len(harness.steps(second)) == (5 if share > MIN_GAIN else 0)
    harness.run()
    harness.check_empty()


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({"max_pack_sequences": 2}, 256),
        ({"max_pack_tokens": 3 * T256 - 1}, 256),
        ({"max_turn_ms": 20 + 0.001 * (2 * T256 + 80)}, 256),
        ({"max_active_sequences": 2}, 256),
        ({"max_turn_ms": 20}, 2048),
    ],
    ids=["sequences", "tokens", "time", "active", "slices"],
)
def test_a_newcomer_that_cannot_join_waits(limits, size):
    harness = Harness(EngineConfig(**limits), ROOMY)
    harness.submit(size, num_images=2, priority=1)
    harness.turns(3)
    newcomer = harness.submit(256)
    harness.turns(4)
    assert newcomer.state is State.WAITING
    assert len(harness.steps()) == 6
    harness.run()
    harness.check_empty()


def test_prompts_that_prove_too_long_for_the_pack_do_not_hold_it_up():
    """Room for one more by its estimate, and not by its true length: the pack must not wait until
    all who would like to join have been encoded."""
    limits = EngineConfig(max_pack_tokens=1100)
    harness = Harness(limits, ROOMY, text_tokens=120)
    first = harness.submit(256)
    harness.turns(3)
    for _ in range(50):
        harness.submit(256, steps=9)
    worked = len(harness.ran)
    while first.sequences[0].step < 3:
        assert harness.turn()
    kinds = [ran.kind for ran in harness.ran[worked:]]
    assert kinds.count("encode") <= 1


def test_images_of_one_request_may_be_at_different_steps():
    harness = Harness()
    request = harness.submit(1024, num_images=2)
    harness.turns(4)
    assert [sequence.step for sequence in request.sequences] == [3, 0]
    harness.run()
    assert [(ran.kind, ran.sequences[0].index) for ran in harness.ran[1:]] == [
        *[("step", 0)] * 8,
        ("decode", 0),
        *[("step", 1)] * 8,
        ("decode", 1),
    ]
    harness.check_empty()


def test_a_request_with_images_of_several_sizes_and_steps_ends_when_all_are_done():
    harness = Harness()
    request = harness.submit(images=[image(512, 4), image(64, 9, num_images=2), image(1024, 1)])
    harness.run()
    assert [sequence.step for sequence in request.sequences] == [4, 9, 9, 1]
    assert all(sequence.state is State.DONE for sequence in request.sequences)
    assert harness.engine.counters.sequences_done == 4
    harness.check_empty()


# Slices.


def slices(harness: Harness, request) -> list[range]:
    return [ran.blocks for ran in harness.steps(request)]


def test_a_large_step_is_cut_into_slices_that_fit_into_a_turn():
    harness = Harness()
    harness.submit(2048, steps=2)
    harness.run()
    one_step = [range(7), range(7, 14), range(14, 21), range(21, 28)]
    assert [ran.blocks for ran in harness.steps()] == one_step * 2
    assert all(ran.ms <= 200 for ran in harness.ran)
    assert sum(ran.ms for ran in harness.steps()) == pytest.approx(2 * H200.step([T2048]))
    assert harness.engine.counters.steps == harness.engine.counters.packs == 2
    harness.check_empty()


@pytest.mark.parametrize("max_turn_ms", [20.0, 30.0, 77.0, 150.0, 400.0, 800.0])
@pytest.mark.parametrize("size", [512, 1024, 2048])
def test_no_unit_of_work_is_planned_above_the_turn(max_turn_ms, size):
    harness = Harness(EngineConfig(max_turn_ms=max_turn_ms), decode_slices=8)
    harness.submit(size, steps=2, num_images=3, guidance=2.0)
    harness.submit(512, steps=2)
    harness.run()
    for ran in harness.ran:
        assert ran.ms <= max_turn_ms * (1 + 1e-9) or (ran.kind == "step" and len(ran.blocks) == 1)
    harness.check_empty()


def test_one_block_is_the_smallest_slice():
    harness = Harness(EngineConfig(max_turn_ms=1.0))
    harness.submit(1024, steps=1)
    harness.run()
    assert slices(harness, harness.all[0]) == [range(i, i + 1) for i in range(28)]


def test_a_small_request_runs_between_slices_and_the_paused_step_goes_on_where_it_was():
    harness = Harness()
    big = harness.submit(2048, steps=2)
    harness.turns(3)
    assert slices(harness, big) == [range(7), range(7, 14)]
    paused = harness.executor.paused
    small = harness.submit(256)
    harness.run_until(small)
    assert slices(harness, big) == [range(7), range(7, 14)]
    assert harness.executor.paused == paused
    harness.turn()
    assert slices(harness, big)[2:] == [range(14, 21)]
    harness.run()
    assert len(slices(harness, big)) == 8
    harness.check_empty()


@pytest.mark.parametrize("most", [1, 2, 3])
def test_at_most_so_many_steps_are_paused(most):
    harness = Harness(EngineConfig(max_paused_steps=most))
    paused: set[int] = set()
    # Each is smaller than those before, so it comes first and leaves their steps paused.
    for steps in (9, 7, 5, 3, 1):
        harness.submit(2048, steps=steps)
        for _ in range(3):
            harness.turn()
            paused.add(len(harness.executor.paused))
            assert harness.engine.statistics()["paused_steps"] == len(harness.executor.paused)
    while harness.turn():
        paused.add(len(harness.executor.paused))
    assert paused == set(range(most + 1))
    harness.check_empty()


def test_a_cancelled_request_drops_its_paused_step_and_no_other():
    harness = Harness()
    first = harness.submit(2048, steps=8)
    harness.turns(2)
    second = harness.submit(2048, steps=2)
    harness.turns(2)
    paused = harness.executor.paused
    assert [step.sequences[0].request for step in paused] == [first, second]
    harness.cancel(second)
    assert harness.executor.paused == paused[:1]
    assert second.state is State.CANCELLED
    harness.run()
    assert slices(harness, first) == [range(b, b + 7) for b in (0, 7, 14, 21)] * 8
    harness.check_empty()


# From waiting to active.


def test_prompts_of_requests_that_wait_together_are_encoded_together():
    harness = Harness()
    for _ in range(MAX_ENCODED_TOGETHER + 3):
        harness.submit(256)
    harness.run()
    encodes = [len(ran.requests) for ran in harness.ran if ran.kind == "encode"]
    assert encodes == [MAX_ENCODED_TOGETHER, 3]


def test_prompts_are_encoded_together_as_far_as_a_turn_goes():
    cost = CostModel(floor=0, launch=0, per_token=0.01, per_square=0, encode_per_token=1.0)
    harness = Harness(EngineConfig(max_turn_ms=200), cost)
    for _ in range(7):
        harness.submit(64)
    harness.submit(64, prompt="a" * 4 * 300)
    harness.run()
    encodes = [(len(ran.requests), ran.ms) for ran in harness.ran if ran.kind == "encode"]
    assert [number for number, _ in encodes] == [3, 3, 1, 1]
    assert [ms for _, ms in encodes[:3]] == pytest.approx([64, 64, 64])


def test_only_requests_more_urgent_than_the_running_ones_are_encoded_with_the_first():
    harness = Harness()
    harness.submit(1024)
    harness.turns(2)
    for size in (512, 2048, 256, 1536):
        harness.submit(size)
    harness.turn()
    assert harness.ran[-1].requests == ["r3", "r1"]


def test_no_request_is_begun_while_so_many_sequences_are_active():
    """Those of requests that are encoded already may begin."""
    harness = Harness(EngineConfig(max_active_sequences=6), ROOMY)
    for number in (2, 3, 4):
        harness.submit(256, num_images=number)
    harness.turns(2)
    assert harness.engine.statistics()["active_sequences"] == 9
    for number in (1, 6, 2):
        harness.submit(256, steps=3, num_images=number, priority=1)
    numbers, begun = [], []
    while True:
        before = harness.engine.statistics()["active_sequences"]
        if not harness.turn():
            break
        ran = harness.ran[-1]
        numbers.append(harness.engine.statistics()["active_sequences"])
        live = [s for r in harness.all for s in r.sequences if not s.state.ended]
        assert numbers[-1] == sum(any(s in ran.sequences for ran in harness.steps()) for s in live)
        if ran.kind == "encode":
            begun.append((before, ran.requests))
    # As soon as there is room, in one turn, as they could all share a pack.
    assert begun == [(5, ["r3", "r5", "r4"])]
    assert max(numbers) == 5 + 9
    harness.check_empty()


def test_a_request_with_more_images_than_may_be_active_keeps_others_out_until_they_are_done():
    harness = Harness(EngineConfig(max_active_sequences=4), ROOMY)
    many = harness.submit(64, num_images=9)
    harness.turns(2)
    assert pack_sizes(harness) == [9]
    urgent = harness.submit(64, priority=5)
    while urgent.state is State.WAITING:
        before = harness.engine.statistics()["active_sequences"]
        assert harness.turn()
    assert before == 3
    assert sum(sequence.state is State.DONE for sequence in many.sequences) == 6
    harness.run()
    harness.check_empty()


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_sequence_is_released_as_soon_as_it_is_decoded(overlapped):
    harness = Harness(overlaps_decodes=overlapped)
    request = harness.submit(512, steps=2, num_images=3)
    first, *others = request.sequences
    released = []
    while not request.ended:
        harness.run(until=harness.clock.now + 1e-6)
        done = [sequence for sequence in request.sequences if sequence.state is State.DONE]
        assert harness.executor.released == set(done)
        if len(done) > len(released):
            released = done
            # Those that are still to come do not hold latents yet.
            assert harness.engine.statistics()["active_sequences"] <= (2 if overlapped else 0)
        if done == [first]:
            assert all(sequence.step < 2 for sequence in others[1:])
    assert released == [first, *others]
    harness.check_empty()


def test_a_small_request_is_not_kept_out_by_images_that_have_not_begun():
    """`max_active_sequences` counts latents; images that wait for their first step need not hold
    places that a more urgent request could use."""
    harness = Harness()
    for _ in range(4):
        harness.submit(512, num_images=64)
    harness.turns(5)
    assert harness.engine.statistics()["active_sequences"] == 1
    small = harness.submit(256)
    harness.run_until(small)
    assert harness.latency(small) < 1.0


def test_the_heap_of_waiting_requests_does_not_grow_by_cancelled_ones():
    harness = Harness(EngineConfig(max_queue_s=1e9))
    kept = [harness.submit(2048) for _ in range(20)]
    harness.turns(2)
    for _ in range(50):
        for request in [harness.submit(2048) for _ in range(100)]:
            harness.cancel(request)
            waiting = harness.engine.statistics()["waiting"]
            assert len(harness.scheduler._waiting) <= 2 * waiting + 64
    assert harness.engine.statistics()["waiting"] == 12
    assert all(not request.ended for request in kept)
    for request in kept:
        harness.cancel(request)
    harness.run()
    harness.check_empty()


def test_deadlines_of_requests_that_have_ended_are_forgotten():
    harness = Harness()
    for _ in range(500):
        harness.cancel(harness.submit(256, deadline_s=3600))
    harness.turn()
    assert not harness.engine._deadlines


def test_far_deadlines_of_requests_that_have_ended_do_not_pile_up_behind_a_near_one():
    harness = Harness()
    harness.submit(256, deadline_s=60)
    for _ in range(500):
        harness.cancel(harness.submit(256, deadline_s=3600))
        assert len(harness.engine._deadlines) <= 2 * 2 + 64
    harness.run()
    harness.check_empty()


# Estimates.


def test_the_true_length_of_a_prompt_replaces_the_estimate():
    harness = Harness(text_tokens=300)
    request = harness.submit(256)
    estimated = harness.engine.outstanding_ms
    harness.turn()
    assert request.sequences[0].tokens == (556,)
    assert harness.engine.outstanding_ms > 1.5 * estimated
    harness.turn()
    assert harness.ran[-1].ms == pytest.approx(H200.step([556]))


# All steps of a lone sequence in one turn.


def whole(harness: Harness) -> list[int]:
    return [ran.num_steps for ran in harness.steps()]


def test_a_lone_sequence_does_all_its_steps_in_one_turn():
    harness = Harness(full_schedule_graphs=True)
    harness.submit(256)
    harness.run()
    assert whole(harness) == [8]
    assert harness.engine.counters.steps == 8
    assert harness.engine.counters.packs == 1
    assert harness.engine.counters.done == 1
    harness.check_empty()


def test_the_next_lone_sequence_does_so_while_the_last_one_is_decoded_beside_it():
    harness = Harness(full_schedule_graphs=True, overlaps_decodes=True)
    harness.submit(256)
    while not harness.steps():
        harness.turn()
    harness.submit(256)
    harness.run()
    assert whole(harness) == [8, 8]


@pytest.mark.parametrize(
    "case",
    ["two requests", "two images", "guided", "too long for a turn", "wants_previews", "no graphs"],
)
def test_otherwise_steps_are_turns_of_their_own(case):
    harness = Harness(full_schedule_graphs=case != "no graphs")
    request = harness.submit(
        1024 if case == "too long for a turn" else 256,
        num_images=2 if case == "two images" else 1,
        guidance=3.5 if case == "guided" else 0.0,
    )
    if case == "two requests":
        harness.submit(256)
    for sequence in request.sequences:
        sequence.wants_previews = case == "wants_previews"
    harness.run_until(request)
    assert {ran.num_steps for ran in harness.steps(request)} == {1}


def test_all_steps_of_a_lone_sequence_keep_to_the_time_of_a_turn():
    harness = Harness(EngineConfig(max_turn_ms=100), full_schedule_graphs=True)
    for steps in (4, 8, 12, 40):
        harness.submit(256, steps=steps)
        harness.run()
    assert harness.engine.counters.longest_turn_ms <= 100
    assert max(whole(harness)) > 4


def test_one_that_comes_to_a_lone_sequence_under_way_steps_with_it():
    harness = Harness(cost=ROOMY, full_schedule_graphs=True)
    first = harness.submit(256)
    first.sequences[0].wants_previews = True
    while not harness.steps():
        harness.turn()
    harness.submit(256)
    harness.run()
    assert 2 in pack_sizes(harness)
    assert set(whole(harness)) == {1}
