"""Times of work on the device, several things in turn."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Work = Callable[[], object]

WARM_UP_S = 4.0
"""After which two warm-ups of long work have to do."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one piece of work, over repeats."""

    median: float
    low: float
    high: float


def timings(
    works: Sequence[Work], device: torch.device, seconds: float = 1.0, repeats: int = 50
) -> list[Timing]:
    """Wall times of some pieces of work, one after another in every round, device work included.

    Args:
        works: what to time.
        device: waited for after each.
        seconds: after which no further round is begun; three are in any case.
        repeats: most rounds.
    """
    for work in works:  # builds kernels, fills caches, captures graphs
        start = time.perf_counter()
        for number in range(3):
            if number < 2 or time.perf_counter() - start < WARM_UP_S:
                work()
            _wait(device)
    found: list[list[float]] = [[] for _ in works]
    start = time.perf_counter()
    for number in range(repeats):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for times, work in zip(found, works, strict=True):
            _wait(device)
            begin = time.perf_counter()
            work()
            _wait(device)
            times.append((time.perf_counter() - begin) * 1e3)
    return [Timing(median(times), min(times), max(times)) for times in found]


def queued(work: Work, device: torch.device, count: int, seconds: float = 0.5) -> Timing:
    """Time of one of ``count`` calls queued together: of short work, without its launch."""

    def all_of_them() -> None:
        for _ in range(count):
            work()

    (timing,) = timings([all_of_them], device, seconds)
    return Timing(timing.median / count, timing.low / count, timing.high / count)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
