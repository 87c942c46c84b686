"""What scheduling itself costs: the turn of an engine whose device takes no time."""

import statistics
import time

import pytest

from benchmarks.micro.scheduling import (
    ACTIVE,
    PACKS_PAY,
    TURNS,
    WAITING,
    busy_engine,
    num_unfinished,
)
from tests.unit.engine.fakes import H200

LIMIT_MS = 0.3
"""On a machine on which `yardstick_ms` is `YARDSTICK_MS` or less; a slower one has longer."""
YARDSTICK_MS = 0.8
REPEATS = 5


def yardstick_ms() -> float:
    """How long this machine takes for some plain Python."""
    start = time.perf_counter()
    counts: dict[int, int] = {}
    for number in range(10_000):
        counts[number & 255] = counts.get(number & 255, 0) + number
    return (time.perf_counter() - start) * 1e3


@pytest.mark.parametrize("images_each", [1, 64], ids=["64 requests", "one request of 64"])
@pytest.mark.parametrize("cost", [H200, PACKS_PAY], ids=["alone", "packs"])
def test_scheduling_a_turn_costs_little(cost, images_each):
    repeats = []
    yardsticks_ms = []
    for _ in range(REPEATS):
        yardsticks_ms.append(yardstick_ms())
        engine = busy_engine(cost, images_each)
        times_ms = []
        for _ in range(TURNS):
            start = time.perf_counter()
            engine.turn()
            times_ms.append((time.perf_counter() - start) * 1e3)
        repeats.append(times_ms)
        counted = engine.statistics()
        assert (num_unfinished(engine), counted["waiting"]) == (ACTIVE, WAITING)
        # Where packs do not pay, the images of a request follow one another.
        begun = 1 if cost is H200 and images_each == ACTIVE else ACTIVE
        assert counted["active_sequences"] == begun
        assert counted["steps"] > counted["packs"] * (32 if cost is PACKS_PAY else 0)
    # Every repeat does the same, so the least time of each turn is that without other processes.
    least_ms = [min(times_ms) for times_ms in zip(*repeats, strict=True)]
    median, mean = statistics.median(least_ms), statistics.fmean(least_ms)
    limit_ms = LIMIT_MS * max(1.0, min(yardsticks_ms) / YARDSTICK_MS)
    print(f"median {median:.3f} ms, mean {mean:.3f} ms a turn of at most {limit_ms:.3f} ms")
    assert median <= limit_ms
    assert mean <= limit_ms
