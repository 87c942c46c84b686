"""What scheduling itself costs: the turn of an engine whose device takes no time."""

import time

from krea2_bench.micro.timing import PLAIN_PYTHON, Timed, best_of, plain_python
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.engine import MAX_DEADLINE_S, Engine
from krea2_srt.engine.lifecycle import State
from krea2_srt.request import ImageRequest
from krea2_srt.testing.fake_executor import FakeExecutor, VirtualClock

ACTIVE, WAITING = 64, 1000
TURNS = 60

PACKS_PAY = CostModel(floor=0, launch=20, per_token=0.001, per_square=1e-5)
"""Costs of a machine where sharing a forward pays, so that packs are full."""


def busy_engine(cost: CostModel, images_each: int) -> Engine:
    """64 sequences under way, in requests of so many images, and 1,000 waiting requests."""
    clock = VirtualClock()
    device = FakeExecutor(clock, cost=None, full_schedule_graphs=True)
    engine = Engine(device, cost, EngineConfig(max_queue_s=1e9), clock)
    steps = 200
    while num_unfinished(engine) < ACTIVE:
        # Each is smaller than what is left of those before, so it is encoded at once, and begun.
        request = ImageRequest("a cat", 256, 256, steps, num_images=images_each)
        engine.submit(f"active{steps}", [request])
        engine.turn()
        engine.turn()
        steps -= 2
    large = ImageRequest("a cat", 2048, 2048, 200)
    for i in range(WAITING):
        engine.submit(f"waiting{i}", [large], priority=-10, deadline_s=MAX_DEADLINE_S)
    return engine


def num_unfinished(engine: Engine) -> int:
    """Sequences that are encoded and have steps to do."""
    sequences = [s for request in engine.requests.values() for s in request.sequences]
    return sum(sequence.state is State.DENOISING for sequence in sequences)


def scheduler_turn(rounds: int) -> Timed:
    """A turn with full packs, 64 images under way and 1,000 requests waiting."""
    turn_ms, python_ms = [], []
    for _ in range(rounds):
        engine = busy_engine(PACKS_PAY, 1)
        start = time.perf_counter()
        for _ in range(TURNS):
            engine.turn()
        turn_ms.append((time.perf_counter() - start) * 1e3 / TURNS)
        python_ms.append(best_of(plain_python, plain_python, 20)[1])
    return Timed("scheduler turn", min(turn_ms), PLAIN_PYTHON, min(python_ms))
