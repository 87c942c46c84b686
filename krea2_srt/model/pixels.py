"""Pixels as 8-bit images."""

import numpy as np
from torch import Tensor


def quantize(pixels: Tensor) -> Tensor:
    """Round float pixels [3, height, width] in [0, 1] to uint8 [height, width, 3]."""
    levels = pixels.float().mul(255).round_().clamp_(0, 255)
    return levels.byte().permute(1, 2, 0).contiguous()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """The same, as an array on the host."""
    return quantize(pixels).cpu().numpy()
