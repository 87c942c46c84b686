"""A scene: a background and some coloured shapes, and how it is drawn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.demo_model.shapes import SHAPES, outlined

COLOURS = {
    "red": (215, 38, 38),
    "orange": (245, 140, 25),
    "yellow": (250, 222, 50),
    "green": (40, 150, 65),
    "cyan": (70, 205, 215),
    "blue": (40, 75, 205),
    "purple": (125, 55, 170),
    "pink": (248, 140, 190),
    "white": (248, 248, 248),
    "black": (22, 22, 22),
}

STYLES = ("plain", "outline", "striped", "dotted")

LEAST_CONTRAST = 120.0
"""Between a shape and what is behind it, as distance in RGB."""

_STRIPES = 2.2
"""Per radius."""


@dataclass(frozen=True)
class Thing:
    """A shape in a scene.

    Attributes:
        shape: of `shapes.SHAPES`.
        colour: of `COLOURS`.
        style: of `STYLES`.
        x, y: its middle, in pixels.
        radius: in pixels.
    """

    shape: str
    colour: str
    style: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        width, height: in pixels.
        background: a colour, or two: from top to bottom.
        things: in the order of the caption. None covers another.
    """

    width: int
    height: int
    background: tuple[str, ...]
    things: tuple[Thing, ...]

    def draw(self) -> NDArray[np.uint8]:
        """[height, width, 3], with smooth edges."""
        picture = self._draw_background()
        for thing in self.things:
            _draw(thing, picture)
        return picture.round().clip(0, 255).astype(np.uint8)

    def _draw_background(self) -> NDArray[np.float32]:
        top, bottom = (
            np.array(COLOURS[colour], np.float32)
            for colour in (self.background[0], self.background[-1])
        )
        share = ((np.arange(self.height, dtype=np.float32) + 0.5) / self.height)[:, None, None]
        rows = top * (1 - share) + bottom * share
        return np.ascontiguousarray(np.broadcast_to(rows, (self.height, self.width, 3)))


def contrast(one: str, other: str) -> float:
    """Distance of two colours in RGB."""
    return float(np.linalg.norm(np.subtract(COLOURS[one], COLOURS[other])))


def _draw(thing: Thing, picture: NDArray[np.float32]) -> None:
    reach = 1.3 * thing.radius + 1
    top, left = max(0, int(thing.y - reach)), max(0, int(thing.x - reach))
    part = picture[top : int(thing.y + reach) + 1, left : int(thing.x + reach) + 1]
    rows, columns = np.indices(part.shape[:2], dtype=np.float32)
    x = (columns + (left + 0.5 - thing.x)) / np.float32(thing.radius)
    y = (rows + (top + 0.5 - thing.y)) / np.float32(thing.radius)
    distance = SHAPES[thing.shape](x, y)
    if thing.style == "outline":
        distance = outlined(distance)
    colour = np.array(COLOURS[thing.colour], np.float32)
    fill = np.broadcast_to(colour, part.shape)
    if thing.style in ("striped", "dotted"):
        pattern = _stripes(x, y) if thing.style == "striped" else _dots(x, y)
        pattern = np.clip(pattern * thing.radius / _STRIPES + 0.5, 0, 1)[..., None]
        fill = fill * (1 - pattern) + _second(colour) * pattern
    cover = np.clip(0.5 - distance * thing.radius, 0, 1)[..., None]
    part += cover * (fill - part)


def _second(colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colour of stripes and dots: lighter, or darker where the colour is light itself."""
    light = colour.mean() > 150
    return colour * 0.68 if light else colour + (255 - colour) * 0.38


def _stripes(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Positive on the second colour, about two fifths."""
    return (np.sin((x + y) * _STRIPES * np.pi / 2**0.5) - 0.35).astype(np.float32)


def _dots(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    waves = np.cos(x * _STRIPES * np.pi) * np.cos(y * _STRIPES * np.pi)
    return (waves - 0.35).astype(np.float32)
