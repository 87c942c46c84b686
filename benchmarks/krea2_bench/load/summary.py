"""What the outcomes of a point come to, by the usual names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from krea2_bench.load.outcome import CANCELLED, DONE, FAILED, INTERRUPTED, REJECTED, Outcome
from krea2_bench.percentiles import percentile

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Slo:
    """A service-level objective: the latency that a request should not exceed.

    Attributes:
        by_work: seconds, by `Kind.work`; a kind that is not here has none.
    """

    by_work: dict[str, float]

    @classmethod
    def scaled(cls, alone_s: dict[str, float], scale: float) -> "Slo":
        """Multiples of the times alone."""
        return cls({work: scale * seconds for work, seconds in alone_s.items()})

    def met(self, outcome: Outcome) -> bool:
        """Whether a request was done in time."""
        limit_s = self.by_work.get(outcome.work)
        return outcome.outcome == DONE and limit_s is not None and outcome.latency_s <= limit_s


def summarise(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """Figures of one point, for JSON.

    Rates and times count what its kind of outcome says: latencies are those of requests that were
    done, the error rate is that of the judged ones (see `Outcome.judged`). ``seconds`` is from the
    first request's time to be sent to the last one's end.
    """
    counts = Counter(outcome.outcome for outcome in outcomes)
    done = [o for o in outcomes if o.outcome == DONE]
    judged = sum(o.judged for o in outcomes)
    in_time = sum(slo.met(o) for o in done)
    start_s = min((o.due_s for o in outcomes), default=0.0)
    seconds = max((o.done_s for o in outcomes), default=0.0) - start_s
    figures: dict[str, Any] = {
        "requests": len(outcomes),
        **{name: counts[name] for name in (DONE, REJECTED, FAILED, CANCELLED, INTERRUPTED)},
        "seconds": _rounded(seconds),
        "request_throughput": _ratio(len(done), seconds),
        "images_per_s": _ratio(sum(o.n for o in done), seconds),
        "megapixels_per_s": _ratio(sum(o.megapixels for o in done), seconds),
        "error_rate": _ratio(counts[FAILED], judged),
        "rejection_rate": _ratio(counts[REJECTED], judged),
        "goodput_per_s": None,
        "slo_attainment": None,
        "latency_s": {"all": spread(o.latency_s for o in done), **_by_size(done)},
        "preview_s": spread(o.preview_s - o.due_s for o in done if o.preview_s is not None),
        "queue_s": spread(o.stage_ms["queue"] / 1e3 for o in done if "queue" in o.stage_ms),
        "send_lag_s": spread(o.sent_s - o.due_s for o in outcomes),
        "errors": dict(Counter(o.error for o in outcomes if o.error).most_common()),
    }
    if slo.by_work:
        figures["goodput_per_s"] = _ratio(in_time, seconds)
        figures["slo_attainment"] = _ratio(in_time, judged)
    return figures


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Count, mean and percentiles of some seconds; None of none."""
    found = list(values)
    if not found:
        return None
    return {
        "count": len(found),
        "mean": _rounded(sum(found) / len(found)),
        **{f"p{q}": _rounded(percentile(found, q)) for q in PERCENTILES},
    }


def _by_size(done: Sequence[Outcome]) -> dict[str, dict[str, float] | None]:
    sizes = {o.size: o.megapixels / o.n for o in done}
    return {
        size: spread(o.latency_s for o in done if o.size == size)
        for size in sorted(sizes, key=lambda size: (sizes[size], size))
    }


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float) -> float:
    return round(value, 5)
