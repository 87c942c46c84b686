"""A judge that looks at pixels: which shapes of which colours are there, and on what.

No learning: the background is what the left and right borders show, row by row; what differs from
it, in connected pieces, are the things; a piece has the colour of most of its pixels, and the shape
whose drawing covers it best.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tools.demo_model.scene import COLOURS, Scene, Thing
from tools.demo_model.shapes import SHAPES
from tools.demo_model.wish import Wish

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)

_DIFFERENT = 60.0
"""From the background, as distance in RGB."""

_LEAST_AREA = 0.0025
"""Least area of a shape, as part of the picture."""

_GRID = 48
"""Pixels a side of the square in which shapes are compared."""


@dataclass(frozen=True)
class Seen:
    """A thing in a picture.

    Attributes:
        x, y: its middle, as parts of the picture.
        area: part of the picture that it covers.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Report:
    """What a picture shows.

    Attributes:
        background: the colour at the top and the one at the bottom.
        things: the largest first.
    """

    background: tuple[str, str]
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked for.

    Attributes:
        colour: as many things of each asked colour as asked for, and of no other.
        shape: and each has its shape.
        background: the asked colour or colours.
    """

    colour: bool
    shape: bool
    background: bool


def look(picture: NDArray[np.uint8]) -> Report:
    """Look at a picture, [height, width, 3]."""
    pixels = picture.astype(np.float32)
    height, width = pixels.shape[:2]
    edge = max(2, width // 32)
    border = np.concatenate([pixels[:, :edge], pixels[:, -edge:]], axis=1)
    behind = ndimage.median_filter(np.median(border, axis=1), size=(5, 1))
    different = np.linalg.norm(pixels - behind[:, None], axis=-1) > _DIFFERENT
    labels, _ = ndimage.label(different, np.ones((3, 3)))
    things = []
    for label, where in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[where] == label
        area = mask.sum() / (height * width)
        if area < _LEAST_AREA:
            continue
        rows, columns = where
        x = (columns.start + columns.stop) / 2 / width
        y = (rows.start + rows.stop) / 2 / height
        things.append(Seen(_shape(mask), _colour(pixels[where][mask]), x, y, float(area)))
    part = max(1, height // 10)
    background = (_colour(behind[:part]), _colour(behind[-part:]))
    return Report(background, tuple(sorted(things, key=lambda thing: -thing.area)))


def judge(picture: NDArray[np.uint8], wish: Wish) -> Verdict:
    """Compare a picture with a wish."""
    report = look(picture)
    asked = [it for it in wish.asked for _ in range(it.count)]
    kinds = sorted((it.colour, it.shape) for it in asked)
    seen = sorted((thing.colour, thing.shape) for thing in report.things)
    return Verdict(
        [colour for colour, _ in kinds] == [colour for colour, _ in seen],
        kinds == seen,
        (wish.background[0], wish.background[-1]) == report.background,
    )


def _colour(pixels: NDArray[np.float32]) -> str:
    """That of most pixels."""
    nearest = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1).argmin(1)
    return _NAMES[np.bincount(nearest, minlength=len(_NAMES)).argmax()]


def _shape(mask: NDArray[np.bool_]) -> str:
    """The one that covers it best: intersection over union, each stretched to its own borders."""
    mask = _stretched(mask)
    return max(
        _templates(),
        key=lambda it: float((mask & it[1]).sum() / (mask | it[1]).sum()),
    )[0]


@cache
def _templates() -> list[tuple[str, NDArray[np.bool_]]]:
    """Every shape, plain and as an outline."""
    found = []
    for shape in SHAPES:
        for style in ("plain", "outline") if shape != "ring" else ("plain",):
            side = 4 * _GRID
            thing = Thing(shape, "black", style, side / 2, side / 2, side / 2.8)
            drawn = Scene(side, side, ("white",), (thing,)).draw()[..., 0] < 128
            (where,) = ndimage.find_objects(drawn.astype(int))
            found.append((shape, _stretched(drawn[where])))
    return found


def _stretched(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """To the grid, by nearest neighbours."""
    rows, columns = (
        ((np.arange(_GRID) + 0.5) * side / _GRID).astype(int).clip(0, side - 1)
        for side in mask.shape
    )
    return mask[np.ix_(rows, columns)]
