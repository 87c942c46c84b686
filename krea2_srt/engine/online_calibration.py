"""Notices when the machine is faster or slower than the cost model says, at any size of pack."""

from collections import deque
from collections.abc import Sequence
from statistics import median

from krea2_srt.engine.cost import CostModel, Sample, fit

WINDOW = 16
"""Steps of a size that are looked at."""

TOLERANCE = 1.5
"""A factor within which estimates are left alone."""

UNIFORM = 1.25
"""Sizes whose factors differ by less than this are corrected by one factor."""

_SIZES = tuple(2**power for power in range(6, 15))
"""Tokens of the lone sequences that a new fit is held by where nothing was measured."""


class OnlineCalibration:
    """Measured times of steps against estimated ones, by the size of the pack.

    A calibration at a bad moment, or a GPU that has got hot, would otherwise mislead every
    estimate of waiting time and every slice from then on. By size, since a calibration that was
    disturbed in the middle has the wrong shape: it would, for example, take large steps for cheap,
    and have small images share forwards with them.
    """

    def __init__(self) -> None:
        # For `fit`, which runs between two steps: the import would be waited for there.
        import scipy.optimize  # noqa: F401

        self._bands: dict[int, _Band] = {}

    def observe(
        self, branches: Sequence[int], measured_ms: float, estimated_ms: float, cost: CostModel
    ) -> CostModel | None:
        """Note a step, or a slice of one.

        Args:
            branches: tokens of each branch of the pack.
            measured_ms: that it took.
            estimated_ms: that it should have taken.
            cost: the model that says so.

        Returns:
            A better model, once the median of the last `WINDOW` steps of this size is off by more
            than `TOLERANCE`; otherwise None.
        """
        if not (estimated_ms > 0 and measured_ms > 0):
            return None
        band = self._bands.setdefault(sum(branches).bit_length(), _Band())
        band.branches = tuple(branches)
        band.ratios.append(measured_ms / estimated_ms)
        if len(band.ratios) < WINDOW or 1 / TOLERANCE <= band.factor <= TOLERANCE:
            return None
        known = {size: b for size, b in self._bands.items() if len(b.ratios) >= WINDOW // 2}
        self._bands = {}
        factors = [b.factor for b in known.values()]
        if max(factors) < UNIFORM * min(factors):
            return cost.scaled(band.factor)
        return _fitted(known, cost)


class _Band:
    """Packs with about as many tokens.

    Attributes:
        ratios: measured / estimated times of the last ones.
        branches: of the last one.
    """

    def __init__(self) -> None:
        self.ratios: deque[float] = deque(maxlen=WINDOW)
        self.branches: tuple[int, ...] = ()

    @property
    def factor(self) -> float:
        return median(self.ratios)


def _fitted(known: dict[int, _Band], cost: CostModel) -> CostModel:
    """A model of another shape: as measured where steps were timed, and elsewhere corrected as the
    nearest size is.
    """
    samples = [Sample(b.branches, b.factor * cost.step(b.branches)) for b in known.values()]
    for tokens in _SIZES:
        size = tokens.bit_length()
        nearest = min(known, key=lambda other: abs(other - size))
        if nearest != size:
            samples.append(Sample((tokens,), known[nearest].factor * cost.step([tokens])))
    return fit(samples, cost)
