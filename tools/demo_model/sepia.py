"""The colours of the demo's adapter: one line in RGB, from dark brown to cream."""

import numpy as np
from numpy.typing import NDArray

_DARK = np.array((40, 22, 8), np.float32)
_LIGHT = np.array((255, 236, 200), np.float32)
_LUMINANCE = np.array((0.2126, 0.7152, 0.0722), np.float32) / 255
"""Weights of red, green and blue, which together make 1 of white."""


def in_sepia(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures, [..., 3], in the colours of the line: each pixel by its luminance."""
    light = pictures.astype(np.float32) @ _LUMINANCE
    return _at(light).round().astype(np.uint8)


def distance_from_sepia(pictures: NDArray[np.uint8]) -> float:
    """How far colours are from the line, in RGB, as a mean over all pixels.

    Less than 1 of what `in_sepia` gives, about 110 of the demo's plain colours.
    """
    pixels = pictures.astype(np.float32)
    line = _LIGHT - _DARK
    share = ((pixels - _DARK) @ (line / (line @ line))).clip(0, 1)
    return float(np.linalg.norm(pixels - _at(share), axis=-1).mean())


def _at(share: NDArray[np.floating]) -> NDArray[np.floating]:
    """The line's colours: 0 is its dark end, 1 its light one."""
    return _DARK + share[..., None] * (_LIGHT - _DARK)
