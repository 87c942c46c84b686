import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.online_calibration import TOLERANCE, WINDOW, OnlineCalibration
from krea2_srt.engine.policy import STRETCH
from tests.unit.engine.fakes import H200, Harness

BRANCHES = (300,)


def observe(
    calibration: OnlineCalibration,
    ratio: float,
    times: int,
    branches: tuple[int, ...] = BRANCHES,
    cost: CostModel = H200,
) -> list[CostModel | None]:
    estimated_ms = cost.step(branches)
    return [
        calibration.observe(branches, estimated_ms * ratio, estimated_ms, cost)
        for _ in range(times)
    ]


@pytest.mark.parametrize("ratio", [1.0, 0.99 * TOLERANCE, 1.01 / TOLERANCE])
def test_what_is_nearly_right_is_left_alone(ratio):
    assert observe(OnlineCalibration(), ratio, 5 * WINDOW) == [None] * 5 * WINDOW


@pytest.mark.parametrize("ratio", [0.2, 3.0])
def test_what_is_wrong_is_corrected_once_after_a_window(ratio):
    calibration = OnlineCalibration()
    assert observe(calibration, ratio, WINDOW - 1) == [None] * (WINDOW - 1)
    (corrected,) = observe(calibration, ratio, 1)
    assert corrected is not None
    assert corrected.step([4160]) == pytest.approx(ratio * H200.step([4160]))
    assert observe(calibration, 1.0, 3 * WINDOW, cost=corrected) == [None] * 3 * WINDOW


def test_a_few_outliers_correct_nothing():
    calibration = OnlineCalibration()
    for _ in range(20):
        assert set(observe(calibration, 100.0, 3) + observe(calibration, 1.0, 5)) == {None}


def test_steps_without_time_are_not_counted():
    calibration = OnlineCalibration()
    for _ in range(WINDOW):
        assert calibration.observe(BRANCHES, 0.0, 10.0, H200) is None
        assert calibration.observe(BRANCHES, 10.0, 0.0, H200) is None
    assert observe(calibration, 3.0, WINDOW)[-1] is not None


def test_few_large_steps_count_among_many_small_ones():
    """A factor of its own for each size: the many may not outvote the few."""
    calibration = OnlineCalibration()
    found = []
    for _ in range(WINDOW):
        found += observe(calibration, 1.0, 9)
        found += observe(calibration, 4.0, 1, (4160,))
    (corrected,) = (cost for cost in found if cost is not None)
    assert corrected.step([300]) == pytest.approx(H200.step([300]), rel=0.5)
    assert corrected.step([4160]) == pytest.approx(4 * H200.step([4160]), rel=0.5)


SPOILT = CostModel(floor=0, launch=83, per_token=0.175, per_square=0, blocks=4)
TRUE = CostModel(floor=0, launch=2, per_token=0.015, per_square=2.4e-5, blocks=4)
"""A calibration that another start disturbed, as it was found; and the machine as it was."""


def test_a_spoilt_shape_is_mended():
    calibration, cost = OnlineCalibration(), SPOILT
    for branches in [(270,), (270,), (1050,), (270, 270), (4106,), (1050, 270)] * 10 * WINDOW:
        corrected = calibration.observe(branches, TRUE.step(branches), cost.step(branches), cost)
        cost = corrected or cost
    for branches in ([100], [270], [1050], [4106], [270, 4106]):
        assert cost.step(branches) == pytest.approx(TRUE.step(branches), rel=0.5)


def test_small_images_leave_the_forwards_of_large_ones_once_the_shape_is_mended():
    """With the spoilt shape a large step looked cheap, and worth sharing."""
    slowdown = TRUE.step([4106]) / SPOILT.step([4106])
    harness = Harness(EngineConfig(max_turn_ms=200), SPOILT.scaled(slowdown / 5), true_cost=TRUE)
    for _ in range(6):
        harness.submit(256, steps=8)
        harness.submit(1024, steps=8)
        harness.run()
    before = len(harness.steps())
    small = harness.submit(256, steps=8)
    large = harness.submit(1024, steps=8)
    harness.run()
    for ran in harness.steps()[before:]:
        assert ran.ms <= 200
        assert len(ran.sequences) == 1
    assert harness.ended_at[small.id] < harness.ended_at[large.id]


@pytest.mark.parametrize("slowdown", [0.25, 3.0])
def test_times_that_are_told_late_are_those_of_their_own_steps(slowdown):
    """Not of the call that tells them, which may be of a step of another size."""
    harness = Harness(reports_late=True, slowdown=slowdown)
    for _ in range(WINDOW):
        harness.submit(64, steps=1)
        harness.submit(1024, steps=1)
    harness.run()
    for tokens in (300, 4160):
        estimate = harness.engine.cost.step([tokens])
        assert estimate == pytest.approx(slowdown * H200.step([tokens]), rel=0.01)


@pytest.mark.parametrize("slowdown", [0.25, 3.0])
def test_estimates_follow_the_machine(slowdown):
    harness = Harness(slowdown=slowdown)
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


def test_a_paused_step_stays_out_of_packs_when_it_would_now_fit_into_one():
    cost = CostModel(floor=0, launch=20, per_token=0.03, per_square=0)
    harness = Harness(EngineConfig(max_turn_ms=100), cost, slowdown=0.25)
    paused = harness.submit(1024, steps=2)
    harness.turns(2)
    assert harness.executor.paused
    urgent = harness.submit(256, steps=2 * WINDOW, priority=3)
    harness.run_until(urgent)
    assert harness.engine.cost.step([4160]) < 100
    assert len(harness.steps(paused)) == 1
    harness.run()
    harness.check_empty()
