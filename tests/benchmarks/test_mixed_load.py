"""The benchmark's arithmetic: what it makes of known samples."""

import pytest

from benchmarks.mixed_load import LARGE, SMALL, Run, Served, figures, trace
from benchmarks.percentiles import percentile


@pytest.mark.parametrize(("q", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100), (0.1, 1)])
def test_percentiles_are_nearest_ranks(q, expected):
    assert percentile(range(100, 0, -1), q) == expected


def test_of_one_value_every_percentile_is_that_value():
    assert percentile([7.0], 95) == 7.0


def test_traces_are_poisson_with_a_fixed_share_of_large_ones():
    arrivals = trace(2000, 5.0, seed=1)
    assert sum(a.size == LARGE for a in arrivals) == 200
    assert arrivals[-1].due == pytest.approx(400, rel=0.1)
    assert [a.due for a in arrivals] == sorted(a.due for a in arrivals)
    assert trace(20, 5.0, 1) == trace(20, 5.0, 1) != trace(20, 5.0, 2)


def run(ours: float, sglang: float, hang_up: float = 0.5) -> Run:
    """Two rounds in which everything of a side takes as long as it says."""
    served = {
        side: [[Served(SMALL, s)] * 18 + [Served(LARGE, 10 * s)] * 2] * 2
        for side, s in (("ours", ours), ("sglang", sglang))
    }
    return Run(
        alone={side: {SMALL: 0.4, LARGE: 4.0} for side in ("ours", "sglang")},
        per_second=1.0,
        served=served,
        seconds={"ours": [20.0, 20.0], "sglang": [20.0, 20.0]},
        burst_seconds={"ours": [5.0, 5.0], "sglang": [10.0, 10.0]},
        hang_ups={"ours": [hang_up, hang_up], "sglang": [20.0, 20.0]},
    )


def row(run: Run, name: str) -> dict:
    (found,) = (row for row in figures(run) if row["figure"].startswith(name))
    return found


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.1, False)])
def test_the_tail_of_small_ones_must_be_a_quarter(ours, met):
    found = row(run(ours, 4.0), f"p95 of {SMALL}")
    assert (found["ratio"], found["met"]) == (pytest.approx(ours / 4), met)
    assert found["ratios_by_round"] == [pytest.approx(ours / 4)] * 2


@pytest.mark.parametrize(("ours", "met"), [(6.0, True), (6.1, False)])
def test_the_tail_of_large_ones_may_be_half_as_long_again(ours, met):
    assert row(run(ours, 4.0), f"p95 of {LARGE}")["met"] is met


def test_throughput_is_images_by_seconds():
    assert row(run(1, 1), "throughput at that load")["ratio"] == 1.0
    assert row(run(1, 1), "throughput, 10 at once")["ours"] == 2.0


@pytest.mark.parametrize(("seconds", "met"), [(0.9, True), (0.91, False)])
def test_abandoned_requests_may_delay_by_a_step(seconds, met):
    """A step of one that takes 4 s alone, in 8 steps: half a second."""
    assert row(run(1, 1, seconds), "its delay by them")["met"] is met
