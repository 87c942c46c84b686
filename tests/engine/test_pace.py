import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.pace import TOLERANCE, WINDOW, Pace
from krea2_srt.engine.policy import STRETCH
from tests.engine.fakes import H200, Harness


def observe(pace: Pace, ratio: float, times: int) -> list[float | None]:
    return [pace.observe(10.0 * ratio, 10.0) for _ in range(times)]


@pytest.mark.parametrize("ratio", [1.0, 0.99 * TOLERANCE, 1.01 / TOLERANCE])
def test_what_is_nearly_right_is_left_alone(ratio):
    assert observe(Pace(), ratio, 5 * WINDOW) == [None] * 5 * WINDOW


@pytest.mark.parametrize("ratio", [0.2, 3.0])
def test_what_is_wrong_is_corrected_once_after_a_window(ratio):
    pace = Pace()
    assert observe(pace, ratio, WINDOW) == [None] * (WINDOW - 1) + [pytest.approx(ratio)]
    assert observe(pace, 1.0, 3 * WINDOW) == [None] * 3 * WINDOW


def test_a_few_outliers_correct_nothing():
    pace = Pace()
    for _ in range(20):
        assert set(observe(pace, 100.0, 3) + observe(pace, 1.0, 5)) == {None}


def test_steps_without_time_are_not_counted():
    pace = Pace()
    assert [pace.observe(0.0, 10.0), pace.observe(10.0, 0.0)] * WINDOW == [None] * 2 * WINDOW
    assert observe(pace, 3.0, WINDOW)[-1] == pytest.approx(3.0)


@pytest.mark.parametrize("slowdown", [0.25, 3.0])
def test_estimates_follow_the_machine(slowdown):
    harness = Harness(EngineConfig(policy="fcfs"), slowdown=slowdown)
    harness.submit(256, steps=WINDOW)
    waiting = harness.submit(1024)
    harness.turns(WINDOW)
    assert harness.engine.cost == H200
    before = waiting.remaining_ms
    harness.turn()
    assert harness.engine.cost.step([4160]) == pytest.approx(slowdown * H200.step([4160]))
    slower_ms = (slowdown - 1) * 8 * H200.step([4160])
    assert waiting.remaining_ms == pytest.approx(before + slower_ms)
    # Only steps were timed, so nothing else is corrected.
    assert harness.engine.cost.encode(64) == H200.encode(64)
    assert harness.engine.cost.decode(1024**2) == H200.decode(1024**2)
    total = sum(request.remaining_ms for request in harness.engine.requests.values())
    assert harness.engine.outstanding_ms == pytest.approx(total)
    harness.run()
    harness.check_empty()


def test_slices_follow_the_machine():
    harness = Harness(slowdown=4.0)
    harness.submit(2048, steps=20)
    harness.run()
    slices = harness.steps()
    assert slices[0].ms > 700
    assert max(ran.ms for ran in slices[WINDOW + 4 :]) <= 200
    assert len(slices[-1].blocks) == 1


def test_waiting_requests_are_put_in_order_again():
    """A machine that is much slower makes remaining work weigh more than a head start."""
    harness = Harness(slowdown=10.0)
    harness.submit(64, steps=WINDOW + 2, request_id="running", priority=10)
    harness.turn()
    harness.submit(1024, request_id="early")
    harness.clock.advance(1000 * STRETCH)
    harness.submit(512, steps=6, request_id="late")
    early, late = (harness.engine.requests[name] for name in ("early", "late"))
    assert early.key < late.key
    harness.run()
    assert list(harness.ended) == ["running", "late", "early"]
    encoded = [ran.requests for ran in harness.ran if ran.kind == "encode"]
    assert encoded == [["running"], ["late", "early"]]


def test_a_held_step_stays_out_of_packs_when_it_would_now_fit_into_one():
    cost = CostModel(floor=0, launch=20, per_token=0.03, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=100), cost, slowdown=0.25)
    held = harness.submit(1024, steps=2)
    harness.turns(2)
    assert harness.executor.held
    urgent = harness.submit(256, steps=2 * WINDOW, priority=3)
    harness.run_until(urgent)
    assert harness.engine.cost.step([4160]) < 100
    assert len(harness.steps(held)) == 1
    harness.run()
    harness.check_empty()
