"""Whether both sides generate the same pictures: speed that is bought with wrong ones must show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite where they are equal."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare_pictures(
    side: Mapping[int, Sequence[np.ndarray]],
    baseline: Mapping[int, Sequence[np.ndarray]],
    min_psnr: float,
) -> dict[str, Any]:
    """Compare the pictures of the requests that both sides have generated.

    Args:
        side, baseline: pictures by the request's index.
        min_psnr: of pictures that count as the same, in dB.

    Returns:
        For JSON: how many, how many are equal to the byte, how many are below ``min_psnr``, and the
        least and the median ratio of those that are not equal.
    """
    ratios = [
        psnr(a, b)
        for index in sorted(side.keys() & baseline.keys())
        for a, b in zip(side[index], baseline[index], strict=True)
    ]
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    return {
        "compared": len(ratios),
        "equal": len(ratios) - len(finite),
        "different": sum(ratio < min_psnr for ratio in finite),
        "min_psnr": min_psnr,
        "psnr_min": round(min(finite), 2) if finite else None,
        "psnr_median": round(float(np.median(finite)), 2) if finite else None,
    }
