"""Times of some work as ratios to reference work, taken in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """A measurement.

    Attributes:
        name: of what was timed.
        ms: of one unit of it, at best.
        reference: what it is compared to.
        reference_ms: of that, at best.
        bound: of the ratio, up to which it may be worse than the last of the history; None is by a
            share of that.
    """

    name: str
    ms: float
    reference: str
    reference_ms: float
    bound: float | None = None

    @property
    def ratio(self) -> float:
        return self.ms / self.reference_ms


def best_of(work: Work, reference: Work, rounds: int) -> tuple[float, float]:
    """Milliseconds of both at their best. What else runs on the machine makes work slower and
    never faster, so the least time is nearest to the truth.

    Args:
        work, reference: run in turn; each call is timed as a whole.
        rounds: calls of each, after one to warm up.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for found, one in zip(times, (work, reference), strict=True):
            start = time.perf_counter()
            one()
            if number:
                found.append((time.perf_counter() - start) * 1e3)
    return min(times[0]), min(times[1])


PLAIN_PYTHON = "plain Python"


class _Item:
    def __init__(self, key: float, number: int) -> None:
        self.key = key
        self.number = number


def plain_python() -> float:
    """Heaps, dictionaries, objects and floats: what code without tensors consists of."""
    heap: list[tuple[float, int]] = []
    for number in range(300):
        heappush(heap, (number * 7919 % 1000 / 3, number))
    table: dict[int, _Item] = {}
    while heap:
        key, number = heappop(heap)
        table[number] = _Item(key, number)
    return sum(item.key for item in table.values() if item.number % 3)
