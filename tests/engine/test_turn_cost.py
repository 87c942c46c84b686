"""What scheduling itself costs: the turn of an engine whose device takes no time."""

import statistics
import time

import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import MAX_DEADLINE_S, Engine
from krea2_srt.engine.lifecycle import State
from tests.engine.fakes import H200, image

LIMIT_MS = 0.3
ACTIVE, WAITING = 64, 1000
REPEATS, TURNS = 5, 60

PACKS_PAY = CostModel(floor=0, launch=20, per_token=0.001, per_square=1e-5)


class InstantExecutor:
    """Does nothing at once."""

    decodes_aside = False
    whole_schedules = True

    def encode(self, requests):
        pass

    def step(self, step, blocks):
        return ()

    def drop_step(self, step):
        pass

    def decode(self, sequence):
        return True

    def release(self, sequence):
        pass


def busy_engine(cost: CostModel, images_each: int) -> Engine:
    """64 sequences under way, in requests of so many images, and 1,000 waiting requests."""
    now = 0.0
    engine = Engine(InstantExecutor(), cost, EngineConfig(max_queue_s=1e9), lambda: now)
    steps = 200
    while num_unfinished(engine) < ACTIVE:
        # Each is smaller than what is left of those before, so it is encoded at once, and begun.
        engine.submit(f"active{steps}", [image(256, steps, num_images=images_each)])
        engine.turn()
        engine.turn()
        steps -= 2
    for i in range(WAITING):
        engine.submit(f"waiting{i}", [image(2048, 200)], priority=-10, deadline_s=MAX_DEADLINE_S)
    return engine


def num_unfinished(engine: Engine) -> int:
    """Sequences that are encoded and have steps to do."""
    sequences = [s for request in engine.requests.values() for s in request.sequences]
    return sum(sequence.state is State.DENOISING for sequence in sequences)


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
