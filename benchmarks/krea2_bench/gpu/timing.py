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
    """Milliseconds of one piece of work, over repeats.

    Attributes:
        median, low, high: of all repeats.
        span: seconds on the machine's own clock from which to which they ran.
    """

    median: float
    low: float
    high: float
    span: tuple[float, float] | None = None


def timings(
    works: Sequence[Work],
    device: torch.device,
    seconds: float = 1.0,
    repeats: int = 50,
    warm_ups: int = 3,
    least: int = 3,
) -> list[Timing]:
    """Wall times of some pieces of work, one after another in every round, device work included.

    Args:
        works: what to time.
        device: waited for after each.
        seconds: after which no further round is begun.
        repeats: most rounds.
        warm_ups: most runs before; no third one of long work.
        least: rounds in any case.
    """
    for work in works:  # builds kernels, fills caches, captures graphs
        start = time.perf_counter()
        for number in range(warm_ups):
            if number < 2 or time.perf_counter() - start < WARM_UP_S:
                work()
            wait(device)
    found: list[list[float]] = [[] for _ in works]
    begun, start = time.monotonic(), time.perf_counter()
    for number in range(repeats):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for times, work in zip(found, works, strict=True):
            wait(device)
            begin = time.perf_counter()
            work()
            wait(device)
            times.append((time.perf_counter() - begin) * 1e3)
    span = (begun, time.monotonic())
    return [Timing(median(times), min(times), max(times), span) for times in found]


def queued(work: Work, device: torch.device, count: int, seconds: float = 0.5) -> Timing:
    """Time of one of ``count`` calls queued together: of short work, without its launch."""

    def all_of_them() -> None:
        for _ in range(count):
            work()

    (timing,) = timings([all_of_them], device, seconds)
    return Timing(timing.median / count, timing.low / count, timing.high / count, timing.span)


def once(work: Work, device: torch.device) -> Timing:
    """Time of the very first call."""
    wait(device)
    begun, start = time.monotonic(), time.perf_counter()
    work()
    wait(device)
    ms = (time.perf_counter() - start) * 1e3
    return Timing(ms, ms, ms, (begun, time.monotonic()))


def wait(device: torch.device) -> None:
    """For all that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
