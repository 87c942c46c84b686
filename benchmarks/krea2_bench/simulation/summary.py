"""What a simulation comes to, in figures."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from krea2_bench.percentiles import percentile
from krea2_bench.simulation.cluster import Result
from krea2_bench.simulation.schedulers import SLO_FACTOR

WARM_UP = 0.1
"""Part of the arrivals that come before anything is measured."""


@dataclass(frozen=True)
class SizeClass:
    """The requests for one size.

    Attributes:
        requests: measured.
        attainment: part of them in time.
        alone_s: mean.
        p50_s, p95_s, p99_s: latencies; infinite where so many failed.
        p95_slowdown: latency as a multiple of the time alone.
    """

    requests: int
    attainment: float
    alone_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    p95_slowdown: float


@dataclass(frozen=True)
class Summary:
    """Figures of the requests that arrive after the warm-up; rates are those until the last one.

    Attributes:
        images_per_s, megapixels_per_s: finished, in time or not.
        goodput_per_s: images in time.
        utilisation: part of all replicas' time that was spent in turns.
        misses: part of the requests that were late or failed.
        failed: part of the requests that failed.
        jain: Jain's index of the slowdowns of what was done; 1 is equal treatment.
        max_slowdown: largest of them.
        longest_turn_ms: of all turns.
        mean_pack: sequences in a step, on average.
        sizes: by size class, smallest first.
    """

    images_per_s: float
    megapixels_per_s: float
    goodput_per_s: float
    utilisation: float
    misses: float
    failed: float
    jain: float
    max_slowdown: float
    longest_turn_ms: float
    mean_pack: float
    sizes: dict[str, SizeClass]

    @property
    def worst_attainment(self) -> float:
        """That of the size class with the least."""
        return min(size.attainment for size in self.sizes.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null."""
        return _finite(asdict(self) | {"worst_attainment": self.worst_attainment})


def summarise(result: Result) -> Summary:
    """Work the figures out."""
    trace = result.trace
    first = int(WARM_UP * len(trace))
    arrival_s = np.array([arrival.time_s for arrival in trace])
    images = np.array([arrival.job.num_images for arrival in trace])
    megapixels = np.array([arrival.job.megapixels for arrival in trace])
    in_time = result.latency_s <= SLO_FACTOR * result.alone_s
    slowdown = result.latency_s / result.alone_s

    start, end = arrival_s[first], arrival_s[-1]
    ended_s = arrival_s + result.latency_s
    in_window = (ended_s > start) & (ended_s <= end)
    measured = np.arange(len(trace)) >= first
    done = measured & np.isfinite(slowdown)
    size_of = np.array([arrival.job.size for arrival in trace])
    jobs = {arrival.job for arrival in trace[first:]}
    sizes = [job.size for job in sorted(jobs, key=lambda job: (job.width * job.height, job.size))]
    counters = result.counters
    busy_s = sum(c.busy_s for c in counters)
    return Summary(
        images_per_s=float(images[in_window].sum() / (end - start)),
        megapixels_per_s=float(megapixels[in_window].sum() / (end - start)),
        goodput_per_s=float(images[in_window & in_time].sum() / (end - start)),
        utilisation=busy_s / (len(counters) * result.end_s),
        misses=float(1 - in_time[measured].mean()),
        failed=float(1 - done.sum() / measured.sum()),
        jain=float(slowdown[done].sum() ** 2 / (done.sum() * (slowdown[done] ** 2).sum())),
        max_slowdown=float(slowdown[done].max()),
        longest_turn_ms=max(c.longest_turn_ms for c in counters),
        mean_pack=sum(c.steps for c in counters) / max(1, sum(c.packs for c in counters)),
        sizes={
            size: _size_class(result, slowdown, in_time, measured & (size_of == size))
            for size in dict.fromkeys(sizes)
        },
    )


def _size_class(
    result: Result, slowdown: np.ndarray, in_time: np.ndarray, chosen: np.ndarray
) -> SizeClass:
    p50, p95, p99 = (percentile(result.latency_s[chosen], q) for q in (50, 95, 99))
    return SizeClass(
        int(chosen.sum()),
        float(in_time[chosen].mean()),
        float(result.alone_s[chosen].mean()),
        p50,
        p95,
        p99,
        percentile(slowdown[chosen], 95),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
