"""Jobs of child processes for `krea2_bench.threads.measure`; see `krea2_bench.workers`."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea2_srt.threads import VARIABLES, limit_spinning

if TYPE_CHECKING:
    from krea2_srt.engine.engine import Engine
    from krea2_srt.runner.executor import RunnerExecutor

CORES = 2
"""That the engine and its neighbour share, on a machine of any size."""

PROMPT = "a red heart on a yellow background"
STEPS = 8
MATRIX = 512
"""Rows of the neighbour's products: some milliseconds each, as a model's are."""

Message = dict[str, Any]


def generate(model: Path, settings: Message) -> Iterator[Message]:
    """The engine without a server: for every line {"sides"} on stdin, one picture of each size.

    Args:
        model: checkpoint folder.
        settings: "waiting", variables of OpenMP's library or None for what `limit_spinning` sets;
            "cost", of another one's first answer, so that both make the same packs.

    Yields:
        {"cost"} once it is ready, then {"ms"} of all the pictures of a line.
    """
    _share_cores()
    _wait_as(settings["waiting"])
    from krea2_srt.engine.config import EngineConfig
    from krea2_srt.engine.cost import CostModel
    from krea2_srt.engine.engine import Engine
    from krea2_srt.runner.calibration import calibrate
    from krea2_srt.runner.executor import RunnerExecutor

    runner = _runner(model)
    cost = CostModel(**settings["cost"]) if settings["cost"] else calibrate(runner)
    executor = RunnerExecutor(runner)
    engine = Engine(executor, cost, EngineConfig(max_queue_s=1e6))
    yield {"cost": asdict(cost)}
    numbers = count()
    for line in sys.stdin:
        sides = json.loads(line)["sides"]
        start = time.perf_counter()
        _generate_all(engine, executor, sides, numbers)
        yield {"ms": (time.perf_counter() - start) * 1e3}


def compute(model: Path, settings: Message) -> Iterator[Message]:
    """Somebody else's process: multiplies matrices with torch's threads while it is told to.

    Yields:
        {"busy"} once it is ready, and for every line {"busy"} on stdin once it is so.
    """
    del model, settings
    _share_cores()
    _wait_as({})
    import torch

    torch.set_num_threads(CORES)
    matrix = torch.randn(MATRIX, MATRIX)
    busy, ended = threading.Event(), threading.Event()

    def multiply() -> None:
        while busy.wait() and not ended.is_set():
            torch.mm(matrix, matrix)

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        yield {"busy": False}
        for line in sys.stdin:
            wanted = json.loads(line)["busy"]
            (busy.set if wanted else busy.clear)()
            yield {"busy": wanted}
    finally:
        ended.set()
        busy.set()
        thread.join()


def _generate_all(
    engine: "Engine", executor: "RunnerExecutor", sides: Sequence[int], numbers: "count[int]"
) -> None:
    from krea2_srt.engine.events import Ended
    from krea2_srt.request import ImageRequest

    for side in sides:
        number = next(numbers)
        # A new prompt each, which has to be encoded.
        image = ImageRequest(f"{PROMPT}, number {number}", side, side, STEPS, seed=number)
        engine.submit(str(number), [image])
    while not engine.idle:
        for event in engine.turn() or ():
            if isinstance(event, Ended):
                for sequence in event.request.sequences:
                    if executor.take_pixels(sequence) is None:
                        raise RuntimeError(f"no picture: {event.request.error}")


def _share_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def _wait_as(variables: dict[str, str] | None) -> None:
    """Before torch is imported."""
    # As many threads as cores, as in a server that nobody has set up.
    for name in (*VARIABLES, "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    if variables is None:
        limit_spinning()
    else:
        os.environ.update(variables)


def _runner(model: Path) -> Any:
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.runner.model_runner import Krea2Runner

    checkpoint = Krea2Checkpoint.from_folder(model)
    return Krea2Runner.load(checkpoint, torch.device("cpu"), torch.float32)
