import pytest

from krea2_srt.engine.budget import RECOVERY_TURNS
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.events import Ended, Progress, Started
from krea2_srt.engine.lifecycle import State
from krea2_srt.errors import DeadlineError, ModelError, OutOfMemoryError
from tests.unit.engine.fakes import DeviceError, Harness, image

ROOMY = CostModel(floor=0, launch=20, per_token=0.001, per_square=0, encode_per_token=0.001)
T256, T2048 = 256 + 64, 128 * 128 + 64


def check_counts(harness: Harness, **expected: int) -> None:
    harness.check_empty()
    counters = harness.engine.counters.as_dict()
    assert (
        counters["accepted"]
        == len(harness.all)
        == sum(counters[end] for end in ("done", "failed", "cancelled"))
    )
    assert {name: counters[name] for name in expected} == expected


# Steps.


def test_a_poisoned_sequence_fails_alone_and_its_neighbours_finish():
    harness = Harness(cost=ROOMY)
    requests = [harness.submit(256) for _ in range(6)]
    harness.turns(3)
    poisoned = requests[2]
    harness.executor.poisoned.update(poisoned.sequences)
    harness.run()
    assert poisoned.state is State.FAILED
    assert all(r.state is State.DONE for r in requests if r is not poisoned)
    assert harness.executor.ran[3].failed
    assert len(harness.executor.ran[3].sequences) == 6
    check_counts(harness, done=5, failed=1, retried=6, out_of_memory=0)


def test_neighbours_of_a_failure_share_packs_again_afterwards():
    harness = Harness(cost=ROOMY)
    requests = [harness.submit(256) for _ in range(4)]
    harness.executor.poisoned.update(requests[0].sequences)
    harness.run()
    assert [len(ran.sequences) for ran in harness.steps()] == [4, *[1] * 4, *[3] * 7]
    check_counts(harness, done=3, failed=1, retried=4)


def test_sequences_that_are_isolated_run_before_anything_else():
    harness = Harness(cost=ROOMY)
    paused = harness.submit(2048, steps=2, guidance=1.0, request_id="paused")
    harness.turns(2)
    requests = [harness.submit(256, priority=1) for _ in range(3)]
    harness.executor.poisoned.update(requests[1].sequences)
    harness.turns(2)
    assert [(ran.requests, ran.failed) for ran in harness.ran[-1:]] == [(["r1", "r2", "r3"], True)]
    urgent = harness.submit(64, steps=2, priority=5, request_id="urgent")
    worked = len(harness.ran)
    harness.turns(5)
    assert [(ran.kind, ran.requests, ran.failed) for ran in harness.ran[worked:]] == [
        ("step", ["r1"], False),
        ("step", ["r2"], True),
        ("step", ["r3"], False),
        ("encode", ["urgent"], False),
        ("step", ["urgent", "r1", "r3", "paused"], False),
    ]
    harness.run()
    assert paused.state is urgent.state is State.DONE
    check_counts(harness, done=4, failed=1, retried=3)


def test_a_large_sequence_that_is_isolated_runs_all_slices_of_its_step_first():
    """It was small enough for a pack until the machine proved slower."""
    cost = CostModel(floor=0, launch=20, per_token=0.02, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=150), cost)
    requests = [harness.submit(1024), harness.submit(256)]
    harness.executor.poisoned.update(requests[1].sequences)
    harness.turns(2)
    assert harness.ran[-1].failed
    assert len(harness.ran[-1].sequences) == 2
    harness.scheduler.cost = cost.scaled(2)
    harness.submit(64, steps=1, priority=5)
    worked = len(harness.ran)
    harness.turns(4)
    assert [(ran.requests, ran.blocks) for ran in harness.ran[worked:]] == [
        (["r1"], range(28)),
        (["r0"], range(20)),
        (["r0"], range(20, 28)),
        (["r2"], range(0)),
    ]
    assert harness.ran[-1].kind == "encode"
    harness.run()
    check_counts(harness, done=2, failed=1)


def test_a_sequence_that_is_isolated_may_be_cancelled():
    harness = Harness(cost=ROOMY)
    requests = [harness.submit(256) for _ in range(3)]
    harness.executor.poisoned.update(requests[0].sequences)
    harness.turns(2)
    harness.cancel(requests[1])
    harness.run()
    assert not harness.steps(requests[1])[1:]
    check_counts(harness, done=1, failed=1, cancelled=1)


def test_several_poisoned_sequences_each_fail_alone():
    harness = Harness(cost=ROOMY)
    requests = [harness.submit(256) for _ in range(8)]
    for request in requests[::3]:
        harness.executor.poisoned.update(request.sequences)
    harness.run()
    assert [r.state is State.FAILED for r in requests] == [i % 3 == 0 for i in range(8)]
    check_counts(harness, done=5, failed=3)


def test_what_a_client_sees_of_a_foreign_failure_is_its_type_alone():
    harness = Harness()
    request = harness.submit(256)
    harness.executor.poisoned.update(request.sequences)
    harness.run()
    assert type(request.error) is ModelError
    assert str(request.error) == f"the model failed: {DeviceError.__name__}"


def test_a_sliced_step_that_fails_between_slices_fails_its_request():
    harness = Harness()
    big, other = harness.submit(2048), harness.submit(2048, steps=9)
    harness.turns(3)
    assert harness.executor.paused
    harness.executor.poisoned.update(big.sequences)
    harness.run()
    assert (big.state, other.state) == (State.FAILED, State.DONE)
    check_counts(harness, done=1, failed=1)


def test_a_failure_ends_the_request_and_releases_its_other_images():
    harness = Harness()
    request = harness.submit(2048, steps=2, num_images=3)
    bystander = harness.submit(2048, steps=12)
    harness.turns(12)
    assert request.sequences[0].state is State.DONE
    harness.executor.poisoned.add(request.sequences[1])
    harness.run()
    assert [s.state for s in request.sequences] == [State.DONE, State.FAILED, State.FAILED]
    assert bystander.state is State.DONE
    assert harness.steps(request)[-1].sequences[0] is not request.sequences[2]
    check_counts(harness, done=1, failed=1, sequences_done=2)


def test_a_poisoned_image_in_a_pack_with_its_siblings_fails_the_request():
    harness = Harness(cost=ROOMY)
    request, other = harness.submit(256, num_images=4), harness.submit(256, num_images=2)
    harness.turns(2)
    harness.executor.poisoned.add(request.sequences[3])
    harness.run()
    assert request.state is request.sequences[3].state is State.FAILED
    assert other.state is State.DONE
    check_counts(harness, done=1, failed=1)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_sequence_that_is_no_longer_finite_fails_alone(steps, late, overlapped):
    harness = Harness(cost=ROOMY, reports_late=late, overlaps_decodes=overlapped)
    requests = [harness.submit(256, steps) for _ in range(4)]
    harness.executor.non_finite.update(requests[1].sequences)
    harness.run()
    assert [r.state is State.FAILED for r in requests] == [False, True, False, False]
    assert "non-finite" in str(requests[1].error)
    check_counts(harness, done=3, failed=1, retried=0)
    assert all(not ran.failed for ran in harness.ran)


def test_two_images_of_a_request_that_are_no_longer_finite_end_it_once():
    harness = Harness(cost=ROOMY)
    request = harness.submit(256, num_images=3)
    harness.executor.non_finite.update(request.sequences[:2])
    harness.run()
    assert request.state is State.FAILED
    check_counts(harness, failed=1)


def test_what_is_told_late_fails_a_request_that_has_gone_on_but_none_that_has_ended():
    harness = Harness(reports_late=True)
    stepping, cancelled = (harness.submit(256, steps=3) for _ in range(2))
    harness.executor.non_finite.update(stepping.sequences + cancelled.sequences)
    harness.turns(2)
    harness.cancel(cancelled)
    assert not stepping.ended
    harness.run()
    assert stepping.state is State.FAILED
    assert cancelled.state is State.CANCELLED
    check_counts(harness, failed=1, cancelled=1)
    harness.check_empty()


def test_no_sequence_is_done_before_it_is_known_what_became_of_its_last_step(monkeypatch):
    """An engine that does not ask is found out."""
    harness = Harness(reports_late=True)
    monkeypatch.setattr(harness.engine, "_settle", lambda sequence=None: [])
    harness.submit(256, steps=1)
    with pytest.raises(AssertionError):
        harness.run()
    assert "done before it is known" in harness.executor.violations[0]


# Memory.


def test_a_pack_that_does_not_fit_shrinks_the_budget_and_nothing_fails():
    harness = Harness(cost=ROOMY, memory_tokens=8 * T256)
    harness.submit(256, num_images=16)
    harness.run()
    check_counts(harness, done=1, out_of_memory=1)
    assert harness.engine.statistics()["pack_tokens_budget"] == 8 * T256
    # None of them ran alone.
    assert [len(ran.sequences) for ran in harness.steps()] == [16, *[8] * 16]


def test_the_budget_recovers_when_memory_has():
    harness = Harness(EngineConfig(max_pack_tokens=16 * T256), ROOMY, memory_tokens=8 * T256)
    harness.submit(256, num_images=16)
    harness.turns(2)
    assert harness.engine.statistics()["pack_tokens_budget"] == 8 * T256
    harness.executor.memory_tokens = None
    harness.run()
    for _ in range(6):
        harness.submit(256, steps=100, num_images=16)
        harness.run()
    assert harness.engine.statistics()["pack_tokens_budget"] == 16 * T256
    assert len(harness.steps()[-1].sequences) == 16
    assert harness.engine.counters.packs > 4 * RECOVERY_TURNS
    check_counts(harness, done=7, out_of_memory=1)


def test_a_request_that_does_not_fit_alone_fails_and_others_go_on():
    harness = Harness(memory_tokens=5000)
    big, small = harness.submit(2048), harness.submit(1024)
    harness.run()
    assert type(big.error) is OutOfMemoryError
    assert small.state is State.DONE
    check_counts(harness, done=1, failed=1)


def test_paused_steps_are_dropped_before_a_request_fails_for_memory():
    harness = Harness(memory_tokens=T2048 + 100)
    big = harness.submit(2048, steps=3)
    harness.turns(3)
    assert harness.executor.paused
    small = harness.submit(256)
    harness.turns(2)
    assert harness.ran[-1].failed
    assert not harness.executor.paused
    harness.run_until(small)
    harness.run()
    assert (big.state, small.state) == (State.DONE, State.DONE)
    slices = [ran.blocks.start for ran in harness.steps(big) if not ran.failed]
    assert slices == [0, 7, *[0, 7, 14, 21] * 3]
    check_counts(harness, done=2, failed=0, out_of_memory=1)


def test_a_decode_that_does_not_fit_beside_paused_steps_is_tried_again_without_them():
    harness = Harness(memory_tokens=T2048 + 400)
    big = harness.submit(2048, steps=3)
    harness.turns(3)
    small = harness.submit(256, steps=2)
    harness.turns(3)
    assert small.sequences[0].state is State.DECODING
    assert harness.executor.paused
    harness.executor.memory_tokens = T2048 + 200
    harness.run_until(small)
    assert small.state is State.DONE
    harness.run()
    assert big.state is State.DONE
    check_counts(harness, done=2, failed=0, out_of_memory=1)


def test_an_encode_that_does_not_fit_beside_paused_steps_is_tried_again_without_them():
    harness = Harness(memory_tokens=T2048 + 32)
    big = harness.submit(2048, steps=3)
    harness.turns(3)
    assert harness.executor.paused
    small = harness.submit(256, prompt="a" * 236)
    harness.run()
    assert (big.state, small.state) == (State.DONE, State.DONE)
    check_counts(harness, done=2, failed=0)


# Prompts and pictures.


def test_of_prompts_encoded_together_only_the_one_that_cannot_be_fails():
    harness = Harness()
    requests = [harness.submit(256) for _ in range(5)]
    harness.executor.unencodable.add(requests[3])
    harness.run()
    assert [r.state is State.FAILED for r in requests] == [False, False, False, True, False]
    encodes = [(len(r.requests), r.failed) for r in harness.ran if r.kind == "encode"]
    assert sorted(encodes) == [*[(1, False)] * 4, (1, True), (5, True)]
    assert not harness.steps(requests[3])
    check_counts(harness, done=4, failed=1)


def test_a_request_cancelled_between_two_tries_of_its_encode_is_gone():
    harness = Harness()
    requests = [harness.submit(256) for _ in range(3)]
    harness.executor.unencodable.add(requests[0])
    harness.turn()
    assert all(request.state is State.ENCODING for request in requests)
    harness.cancel(requests[1])
    harness.run()
    check_counts(harness, done=1, failed=1, cancelled=1)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_picture_that_cannot_be_decoded_fails_its_request_alone(overlapped):
    harness = Harness(overlaps_decodes=overlapped)
    requests = [harness.submit(images=[image(256, 2), image(256, 5)]) for _ in range(3)]
    harness.executor.undecodable.add(requests[1].sequences[0])
    harness.run()
    assert [r.state is State.FAILED for r in requests] == [False, True, False]
    assert requests[1].sequences[1].state is State.FAILED
    check_counts(harness, done=2, failed=1)


def test_siblings_that_are_decoded_beside_it_end_with_their_request():
    harness = Harness(cost=ROOMY, overlaps_decodes=True)
    request = harness.submit(256, steps=2, num_images=4)
    harness.turns(3)
    assert harness.engine.has_overlapped_decodes
    harness.executor.undecodable.add(request.sequences[2])
    harness.run()
    assert request.state is State.FAILED
    check_counts(harness, failed=1)


@pytest.mark.parametrize("method", ["drop_step", "release"])
def test_a_failing_clean_up_loses_no_request(method, monkeypatch):
    """`Executor`: any method may raise."""

    def fails(what: object) -> None:
        cleans_up(what)
        raise DeviceError("lost")

    harness = Harness()
    requests = [harness.submit(2048)]
    harness.turns(3)
    requests.append(harness.submit(256))
    harness.turns(2)
    cleans_up = getattr(harness.executor, method)
    monkeypatch.setattr(harness.executor, method, fails)
    harness.cancel(requests[0])
    harness.run()
    assert sorted(harness.ended) == ["r0", "r1"]
    counters = harness.engine.counters
    assert counters.accepted == counters.ended == 2
    assert harness.engine.outstanding_ms == 0


# Deadlines.


def is_late(request) -> bool:
    return request.state is State.FAILED and isinstance(request.error, DeadlineError)


def test_a_deadline_that_passes_while_waiting_costs_no_work():
    harness = Harness()
    first, late = harness.submit(1024, priority=1), harness.submit(512, deadline_s=0.3)
    harness.run()
    assert is_late(late)
    assert str(late.error) == "deadline of 0.3 s exceeded"
    assert not any(late.id in ran.requests for ran in harness.ran if ran.kind != "encode")
    assert late.reached[State.FAILED] == pytest.approx(0.3, abs=0.15)
    assert first.state is State.DONE
    check_counts(harness, done=1, failed=1)


def test_a_deadline_that_passes_between_two_slices_drops_the_step():
    harness = Harness()
    late = harness.submit(2048, deadline_s=1.0)
    harness.run()
    assert is_late(late)
    assert harness.clock.now == pytest.approx(1.0, abs=0.2)
    assert 0 < len(harness.steps(late)) < 8
    check_counts(harness, failed=1)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_deadline_that_passes_during_the_decode_ends_it(overlapped):
    decode_ms = {True: 100, False: 1000}[overlapped]
    cost = CostModel(floor=10, launch=0, per_token=0, per_square=0, decode_launch=decode_ms)
    harness = Harness(cost=cost, overlaps_decodes=overlapped, decode_slices=10)
    late = harness.submit(256, steps=2, deadline_s=0.08)
    harness.turns(3)
    assert late.sequences[0].state is State.DECODING
    harness.turn()
    harness.clock.now = max(harness.clock.now, 0.081)
    harness.run()
    assert is_late(late)
    assert harness.clock.now < 0.2
    check_counts(harness, failed=1)


def test_a_deadline_of_nothing_has_passed_at_once():
    harness = Harness()
    late = harness.submit(256, deadline_s=0)
    harness.run()
    assert is_late(late)
    assert not harness.ran
    check_counts(harness, failed=1)


def test_a_deadline_that_is_met_does_no_harm_later():
    harness = Harness()
    request = harness.submit(256, deadline_s=1.0)
    harness.run()
    harness.clock.advance(5000)
    assert not harness.turn()
    assert request.state is State.DONE
    check_counts(harness, done=1)


# Cancelling.


@pytest.mark.parametrize("turns", range(14))
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_request_can_be_cancelled_at_any_time(turns, overlapped):
    harness = Harness(overlaps_decodes=overlapped, decode_slices=3)
    request = harness.submit(images=[image(2048, 2), image(256, 1)])
    other = harness.submit(512, steps=3)
    harness.turns(turns)
    assert not request.ended
    harness.cancel(request)
    assert request.state is State.CANCELLED
    assert not harness.executor.paused
    worked = len(harness.ran)
    harness.run()
    assert not any(request.id in ran.requests for ran in harness.ran[worked:])
    assert other.state is State.DONE
    check_counts(harness, done=1, cancelled=1)


def test_the_start_every_step_and_the_end_are_reported_once_and_in_order():
    harness = Harness(cost=ROOMY)
    request = harness.submit(256, steps=5, num_images=2)
    harness.run()
    first, *progress, last = harness.events
    assert first == Started(request)
    assert last == Ended(request)
    assert all(isinstance(event, Progress) and event.total == 5 for event in progress)
    assert sorted(event.sequence.index for event in progress) == [0] * 5 + [1] * 5


def test_a_batch_of_prompts_that_fails_is_reported_as_started_once():
    harness = Harness()
    requests = [harness.submit(256) for _ in range(3)]
    harness.executor.unencodable.add(requests[2])
    harness.run()
    started = [event.request for event in harness.events if isinstance(event, Started)]
    assert started == requests


@pytest.mark.parametrize("overlapped", [False, True])
def test_what_happened_is_told_before_the_next_unit_of_work(overlapped):
    """A client must not wait for its end until somebody else's work is done."""
    harness = Harness(overlaps_decodes=overlapped)
    requests = [harness.submit(512, 2), harness.submit(512, 2, deadline_s=0.05)]
    harness.submit(2048, 2)
    harness.run()
    for request in requests:
        assert harness.ended_at[request.id] == request.reached[request.state]


def test_a_request_knows_when_it_came_to_each_state():
    harness = Harness()
    harness.clock.advance(500)
    request = harness.submit(1024, steps=2)
    harness.clock.advance(500)
    harness.run()
    step_s, encode_s, decode_s = (ms / 1e3 for ms in (143.03, 2.51, 24.89))
    assert request.reached == pytest.approx(
        {
            State.WAITING: 0.5,
            State.ENCODING: 1.0,
            State.DENOISING: 1.0 + encode_s,
            State.DECODING: 1.0 + encode_s + 2 * step_s,
            State.DONE: 1.0 + encode_s + 2 * step_s + decode_s,
        },
        abs=1e-3,
    )
