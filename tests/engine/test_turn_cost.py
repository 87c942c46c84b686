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
from tests.engine.fakes import H200

LIMIT_MS = 0.3
REPEATS = 5


@pytest.mark.parametrize("images_each", [1, 64], ids=["64 requests", "one request of 64"])
@pytest.mark.parametrize("cost", [H200, PACKS_PAY], ids=["alone", "packs"])
def test_scheduling_a_turn_costs_little(cost, images_each):
    repeats = []
    for _ in range(REPEATS):
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
    print(f"median {median:.3f} ms, mean {mean:.3f} ms a turn")
    assert median <= LIMIT_MS
    assert mean <= LIMIT_MS
