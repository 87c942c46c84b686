"""Percentiles, as every benchmark here takes them."""

from collections.abc import Sequence

import numpy as np


def percentile(values: np.ndarray | Sequence[float], q: float) -> float:
    """The smallest value that q percent do not exceed; never between two, one of which may be
    infinite.
    """
    return float(np.percentile(values, q, method="inverted_cdf"))
