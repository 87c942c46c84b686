"""Shapes, as signed distances: negative inside, in units of the shape's radius, y downwards."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Distance = Callable[[Field, Field], Field]

_INNER_RADIUS = 0.44
"""Inner radius of a ring. An outlined circle's is far larger; see `OUTLINE`."""

OUTLINE = 0.2
"""Thickness of the line of an outlined shape."""


def circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 1


def square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def triangle(x: Field, y: Field) -> Field:
    """Equilateral, one corner up."""
    y = y - 0.2
    return np.maximum(np.abs(x) * 3**0.5 / 2 - y / 2, y) - 0.56


def star(x: Field, y: Field) -> Field:
    """Five points, one up."""
    # Folded into half a point: the angle from the axis of the nearest one.
    angle = np.arctan2(x, -y)
    fifth = 2 * np.pi / 5
    angle = np.abs(angle - fifth * np.round(angle / fifth))
    length = np.hypot(x, y)
    # Distance from the line between a tip (radius 1.1) and the next dent (radius 0.5).
    tip, dent = np.array([1.1, 0.0]), 0.5 * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    along = (dent - tip) / np.linalg.norm(dent - tip)
    across = length * np.cos(angle) - tip[0], length * np.sin(angle) - tip[1]
    return along[1] * across[0] - along[0] * across[1]


def ring(x: Field, y: Field) -> Field:
    middle = (1 + _INNER_RADIUS) / 2
    return np.abs(np.hypot(x, y) - middle) - (1 - middle)


def heart(x: Field, y: Field) -> Field:
    """Two half circles on a square that stands on its corner."""
    x, y = np.abs(x) / 1.5, (0.62 - y) / 1.5
    upper = np.hypot(x - 0.25, y - 0.75) - 2**0.5 / 4
    half = 0.5 * np.maximum(x + y, 0)
    lower = np.minimum(np.hypot(x, y - 1), np.hypot(x - half, y - half)) * np.sign(x - y)
    return np.where(x + y > 1, upper, lower) * 1.5


SHAPES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "ring": ring,
    "heart": heart,
}


def outlined(distance: Field) -> Field:
    """Only the line along the border, inside it."""
    return np.abs(distance + OUTLINE / 2) - OUTLINE / 2
