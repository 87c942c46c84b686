"""Whether a difference is real: intervals of ratios and differences from rounds in pairs.

In each round both sides were sent the same requests. Two kinds of noise count: that of requests,
which the bootstrap sees by drawing rounds, and requests in them, in pairs and with replacement; and
that of rounds (a machine that was busy for a while slows everything in them), for which there are
few, so that the bootstrap alone would be too sure: Student's t on the rounds' own values sees that.
The interval is the hull of both. A difference is called real only if the interval does not hold "no
difference" and every single round points the same way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99
"""Confidence of each interval: twenty comparisons of equal servers should not find one difference.
"""

RESAMPLES = 2000
MIN_ROUNDS = 3

Statistic = Callable[[np.ndarray], np.ndarray]
"""From values [..., n] to one value for each [...]."""


@dataclass(frozen=True)
class Interval:
    """A comparison of two sides.

    Attributes:
        value: of all rounds together: side / baseline, or side - baseline.
        low, high: of the confidence interval; None where there are too few rounds.
        by_round: the value of each round.
        real: whether it is told apart from no difference.
    """

    value: float
    low: float | None
    high: float | None
    by_round: tuple[float, ...]
    real: bool


def compare_ratios(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], statistic: Statistic, seed: int = 0
) -> Interval | None:
    """The ratio of a statistic of both sides.

    Args:
        pairs: of each round, positive values of the side and of the baseline, in pairs.
        statistic: of one side's values, positive.
        seed: of the bootstrap.

    Returns:
        None where a round has no value.
    """
    return _compare(pairs, statistic, seed, np.log, math.exp)


def compare_differences(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], statistic: Statistic, seed: int = 0
) -> Interval | None:
    """The difference of a statistic of both sides; see `compare_ratios`."""
    return _compare(pairs, statistic, seed, np.asarray, float)


def _compare(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Statistic,
    seed: int,
    scale: Callable[[np.ndarray], np.ndarray],
    back: Callable[[float], float],
) -> Interval | None:
    if not pairs or any(len(side) == 0 for side, _ in pairs):
        return None

    def contrast(side: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        return scale(statistic(side)) - scale(statistic(baseline))

    by_round = np.array([contrast(side, baseline) for side, baseline in pairs])
    together = contrast(*(np.concatenate(values) for values in zip(*pairs, strict=True)))
    if not np.isfinite(by_round).all() or not np.isfinite(together):
        return None
    low, high = _hull(
        _bootstrap(pairs, contrast, np.random.default_rng(seed)), _student(by_round, together)
    )
    one_way = bool((by_round > 0).all() or (by_round < 0).all())
    real = len(pairs) >= MIN_ROUNDS and one_way and not low <= 0 <= high
    known = len(pairs) >= MIN_ROUNDS
    return Interval(
        back(float(together)),
        back(low) if known else None,
        back(high) if known else None,
        tuple(back(value) for value in by_round.tolist()),
        real,
    )


def _bootstrap(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    contrast: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Percentile interval; rounds of unequal length are drawn as they are."""
    found = []
    for _ in range(RESAMPLES):
        drawn = []
        for index in rng.integers(len(pairs), size=len(pairs)):
            chosen = rng.integers(len(pairs[index][0]), size=len(pairs[index][0]))
            drawn.append([values[chosen] for values in pairs[index]])
        found.append(contrast(*(np.concatenate(values) for values in zip(*drawn, strict=True))))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.array(found), [tail, 1 - tail])
    return float(low), float(high)


def _student(by_round: np.ndarray, centre: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean of the rounds, around the value of all together."""
    count = len(by_round)
    if count < 2:
        return -math.inf, math.inf
    from scipy.stats import t

    half = t.ppf((1 + CONFIDENCE) / 2, count - 1) * by_round.std(ddof=1) / math.sqrt(count)
    return float(centre - half), float(centre + half)


def _hull(*intervals: tuple[float, float]) -> tuple[float, float]:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(axis=-1))


def geometric_mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(np.log(values).mean(axis=-1)))


def nth_percentile(q: float) -> Statistic:
    """A percentile, as `krea2_bench.percentiles` takes it."""
    return lambda values: np.percentile(values, q, axis=-1, method="inverted_cdf")
