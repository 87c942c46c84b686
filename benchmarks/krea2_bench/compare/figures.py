"""What two sides are compared by, at one point."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from krea2_bench.compare.statistics import (
    Interval,
    Statistic,
    compare_differences,
    compare_ratios,
    geometric_mean,
    mean,
    nth_percentile,
)
from krea2_bench.load.outcome import DONE, Outcome
from krea2_bench.load.summary import Slo

Rounds = Sequence[Sequence[Outcome]]
"""Outcomes of one side at one point, by round."""

LATENCIES: tuple[tuple[str, Statistic], ...] = (
    ("mean latency", mean),
    ("p50 latency", nth_percentile(50)),
    ("p95 latency", nth_percentile(95)),
)


@dataclass(frozen=True)
class Figure:
    """A comparison.

    Attributes:
        name: of what is compared.
        size: of the requests; "all" of all.
        kind: ``ratio`` (side / baseline) or ``difference`` (side - baseline).
        more_is_better: which way is good.
        interval: what was found; None where there is nothing to compare.
    """

    name: str
    size: str
    kind: str
    more_is_better: bool
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no difference`` or ``unknown``."""
        found = self.interval
        if found is None or found.low is None:
            return "unknown"
        if not found.real:
            return "no difference"
        more = found.value > (1 if self.kind == "ratio" else 0)
        return "better" if more == self.more_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        found = None if self.interval is None else _rounded(asdict(self.interval))
        return {
            "figure": self.name,
            "size": self.size,
            "kind": self.kind,
            "more_is_better": self.more_is_better,
            "verdict": self.verdict,
            "interval": found,
        }


def compare_points(side: Rounds, baseline: Rounds, slo: Slo) -> list[Figure]:
    """All figures of one point.

    Latencies are compared over the requests that both sides have done; a side that refuses or fails
    some shows in what is in time.
    """
    figures = [latency_of_a_request([(side, baseline)])]
    sizes = {o.size: o.megapixels / o.n for outcomes in baseline for o in outcomes}
    ordered = sorted(sizes, key=lambda size: sizes[size])
    for size in ("all", *ordered) if len(ordered) > 1 else ("all",):
        for name, statistic in LATENCIES:
            found = compare_ratios(_latencies(side, baseline, size), statistic)
            figures.append(Figure(name, size, "ratio", False, found))
    throughput = compare_ratios(_per_round(side, baseline, _images_per_s), mean)
    figures.append(Figure("images/s", "all", "ratio", True, throughput))
    if slo.by_work:

        def in_time(outcome: Outcome) -> float:
            return float(slo.met(outcome))

        found = compare_differences(_values(side, baseline, in_time), mean)
        figures.append(Figure("share in time", "all", "difference", True, found))
    return figures


def latency_of_a_request(points: Sequence[tuple[Rounds, Rounds]]) -> Figure:
    """Over all points: how many times as long a request takes as the same one on the baseline, the
    geometric mean. The one figure that a comparison is judged by.
    """
    rounds = len(points[0][0]) if points else 0
    pairs = []
    for number in range(rounds):
        found = [
            _latencies(side[number : number + 1], baseline[number : number + 1], "all")[0]
            for side, baseline in points
        ]
        pairs.append(tuple(np.concatenate(values) for values in zip(*found, strict=True)))
    interval = compare_ratios([(a, b) for a, b in pairs], geometric_mean)
    return Figure("latency of a request", "all", "ratio", False, interval)


def _latencies(side: Rounds, baseline: Rounds, size: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latencies of requests of a size that both have done, in pairs."""
    found = []
    for ours, theirs in zip(side, baseline, strict=True):
        by_index = {o.index: o.latency_s for o in theirs if o.outcome == DONE}
        both = [
            (o.latency_s, by_index[o.index])
            for o in ours
            if o.outcome == DONE and o.index in by_index and size in ("all", o.size)
        ]
        values = np.array(both).reshape(-1, 2)
        found.append((values[:, 0], values[:, 1]))
    return found


def _values(
    side: Rounds, baseline: Rounds, value: Callable[[Outcome], float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of all requests that say something of both servers."""
    found = []
    for ours, theirs in zip(side, baseline, strict=True):
        by_index = {o.index: o for o in theirs if o.judged}
        pairs = [(o, by_index[o.index]) for o in ours if o.judged and o.index in by_index]
        values = np.array([(value(a), value(b)) for a, b in pairs]).reshape(-1, 2)
        found.append((values[:, 0], values[:, 1]))
    return found


def _per_round(
    side: Rounds, baseline: Rounds, value: Callable[[Sequence[Outcome]], float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.array([value(ours)]), np.array([value(theirs)]))
        for ours, theirs in zip(side, baseline, strict=True)
        if value(ours) and value(theirs)
    ]


def _images_per_s(outcomes: Sequence[Outcome]) -> float:
    done = [o for o in outcomes if o.outcome == DONE]
    if not done:
        return 0.0
    return sum(o.n for o in done) / (max(o.done_s for o in done) - min(o.due_s for o in outcomes))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
