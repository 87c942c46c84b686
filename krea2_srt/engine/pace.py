"""Notices when the machine is faster or slower than the cost model says."""

from collections import deque
from statistics import median

WINDOW = 32
"""Steps that are looked at."""

TOLERANCE = 1.5
"""A factor within which estimates are left alone."""


class Pace:
    """Measured times of steps against estimated ones.

    A calibration at a bad moment, or a GPU that has got hot, would otherwise mislead every
    estimate of waiting time and every slice from then on.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)

    def observe(self, measured_ms: float, estimated_ms: float) -> float | None:
        """Note a step.

        Returns:
            The factor by which to correct the estimates, once the median of the last `WINDOW`
            steps is off by more than `TOLERANCE`; otherwise None.
        """
        if estimated_ms > 0 and measured_ms > 0:
            self._ratios.append(measured_ms / estimated_ms)
        if len(self._ratios) < WINDOW:
            return None
        factor = median(self._ratios)
        if 1 / TOLERANCE <= factor <= TOLERANCE:
            return None
        self._ratios.clear()
        return factor
