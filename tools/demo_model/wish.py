"""A wish: what a caption asks for, and the scenes that grant it."""

import math
from dataclasses import dataclass, replace
from random import Random
from zlib import crc32

from tools.demo_model.scene import COLOURS, LEAST_CONTRAST, STYLES, Scene, Thing, contrast
from tools.demo_model.shapes import SHAPES

SIZES = {"small": (0.16, 0.18), "": (0.26, 0.28), "large": (0.37, 0.39)}
"""Radius of a lone shape as part of the picture's shorter side, by what is asked."""

PLACES = {
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "middle": (0.5, 0.5),
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
}
"""Where, as parts of the room that a shape has."""

RELATIONS = ("and", "left of", "right of", "above", "below")
_BACKWARDS = ("right of", "below")
"""Those places that name first what stands last."""

_HELD_OUT = 10
"""One in so many combinations of colour, shape and background is never trained on."""

_GRADIENTS = 0.2

_ABOUT = 0.12
"""How far a lone shape may be from its place, as part of the room that it has."""

_GRID = 8
"""Pixels between the places where shapes may stand: the VAE's scale."""

_GAP = 12
"""Pixels between two shapes at least, as much as places on the grid may take away."""

_BORDER = 3
"""Pixels of background at least around all."""

REACH = 1.15
"""How far a shape reaches from its middle, in radii."""

_SHARES = {"small": (0.5, 0.6), "": (0.75, 0.85), "large": (0.95, 1.0)}
"""Radius of one of several, as part of the room that it has."""

_LEAST_RADIUS = 14
"""Pixels; smaller shapes cannot be told from one another behind a VAE that takes 8 x 8 for one."""


@dataclass(frozen=True)
class Asked:
    """A shape that is asked for.

    Attributes:
        size: of `SIZES`.
        style: of `scene.STYLES`.
        place: of `PLACES`; empty is about the middle.
        count: how many of them; more than one stand beside each other.
    """

    shape: str
    colour: str
    size: str = ""
    style: str = "plain"
    place: str = ""
    count: int = 1


@dataclass(frozen=True)
class Wish:
    """What a caption says.

    Attributes:
        background: a colour, or two from top to bottom.
        asked: one kind of shapes, or two single ones.
        relation: of `RELATIONS`; of the first to the second.
    """

    background: tuple[str, ...]
    asked: tuple[Asked, ...]
    relation: str = "and"

    @property
    def held_out(self) -> bool:
        """Whether it has a combination that is for tests only."""
        return any(
            crc32(f"{it.colour} {it.shape} on {colour}".encode()) % _HELD_OUT == 0
            for it in self.asked
            for colour in self.background
        )

    @property
    def lone(self) -> bool:
        """Whether it asks for one shape only."""
        return len(self.asked) == self.asked[0].count == 1

    def fits(self, width: int, height: int) -> bool:
        """Whether a picture of that size has room for it."""
        if self.lone:
            least = min(width, height) * SIZES[self.asked[0].size][0]
        else:
            room = self._room(width, height)
            least = room * min(_SHARES[it.size][0] for it in self.asked)
        return least >= _LEAST_RADIUS

    def grant(self, width: int, height: int, random: Random) -> Scene:
        """A scene that shows it; what is not asked for is left to chance."""
        if self.lone:
            things = [_lone(self.asked[0], width, height, random)]
        else:
            things = self._row(width, height, random)
        snapped = tuple(_snapped(thing, width, height) for thing in things)
        return Scene(width, height, self.background, snapped)

    @property
    def upright(self) -> bool:
        """Whether several stand one above the other, and not beside each other."""
        return self.relation in ("above", "below")

    @property
    def in_order(self) -> tuple[Asked, ...]:
        """What is asked for, from left to right, or from top to bottom."""
        return self.asked[::-1] if self.relation in _BACKWARDS else self.asked

    def _room(self, width: int, height: int) -> float:
        """The largest radius that each of several shapes may have."""
        sides = (height, width) if self.upright else (width, height)
        cell = sides[0] / sum(it.count for it in self.asked)
        return (min(cell, 0.7 * sides[1]) - _GAP) / 2 / REACH

    def _row(self, width: int, height: int, random: Random) -> list[Thing]:
        """Beside each other, or one above the other."""
        each = [it for it in self.in_order for _ in range(it.count)]
        length, breadth = (height, width) if self.upright else (width, height)
        cell, room = length / len(each), self._room(width, height)
        things, across = [], breadth * random.uniform(0.45, 0.55)
        for number, asked in enumerate(each):
            radius = room * random.uniform(*_SHARES[asked.size])
            along = (number + 0.5) * cell
            x, y = (across, along) if self.upright else (along, across)
            things.append(Thing(asked.shape, asked.colour, asked.style, x, y, radius))
        if self.relation in _BACKWARDS:
            things.reverse()
        return things


def _lone(asked: Asked, width: int, height: int, random: Random) -> Thing:
    radius = min(width, height) * random.uniform(*SIZES[asked.size])
    margin = 1.2 * radius
    across, along = (
        min(max(at + random.uniform(-_ABOUT, _ABOUT), 0), 1)
        for at in PLACES[asked.place or "middle"]
    )
    x = margin + across * max(width - 2 * margin, 0)
    y = margin + along * max(height - 2 * margin, 0)
    return Thing(asked.shape, asked.colour, asked.style, x, y, radius)


def _snapped(thing: Thing, width: int, height: int) -> Thing:
    """To the grid: what a latent pixel has to tell of a border is then one of few things."""
    radius = max(_GRID, _GRID / 2 * int(thing.radius / (_GRID / 2)))
    x, y = (_inside(at, radius, side) for at, side in ((thing.x, width), (thing.y, height)))
    return replace(thing, x=x, y=y, radius=radius)


def _inside(at: float, radius: float, side: int) -> float:
    """The nearest place on the grid where a shape leaves the border free."""
    margin = REACH * radius + _BORDER
    first, last = math.ceil(margin / _GRID), math.floor((side - margin) / _GRID)
    return side / 2 if first > last else _GRID * min(max(round(at / _GRID), first), last)


def draw_wish(random: Random) -> Wish:
    """A wish that one can make: what is asked for can be told from the background."""
    while True:
        background: tuple[str, ...] = (random.choice(list(COLOURS)),)
        if random.random() < _GRADIENTS:
            background = tuple(random.sample(list(COLOURS), 2))
        kind = random.random()
        if kind < 0.65:
            place = random.choice(list(PLACES)) if random.random() < 0.5 else ""
            asked: tuple[Asked, ...] = (_draw_asked(random, place),)
        elif kind < 0.8:
            asked = (_draw_asked(random, count=random.choice([2, 3])),)
        else:
            asked = (_draw_asked(random), _draw_asked(random))
        relation = random.choice(RELATIONS) if len(asked) == 2 else "and"
        wish = Wish(background, asked, relation)
        if _can_be_told(wish):
            return wish


def _draw_asked(random: Random, place: str = "", count: int = 1) -> Asked:
    style = random.choice(STYLES) if random.random() < 0.25 else "plain"
    shape = random.choice(list(SHAPES))
    size = random.choice(["", "", "", "small", "large"])
    if shape == "ring" or size == "small":
        style = "plain"  # too thin to show one
    return Asked(shape, random.choice(list(COLOURS)), size, style, place, count)


def _can_be_told(wish: Wish) -> bool:
    kinds = {(it.shape, it.colour) for it in wish.asked}
    if len(kinds) < len(wish.asked):
        return False
    if len(wish.background) == 2 and contrast(*wish.background) < LEAST_CONTRAST:
        return False
    return all(_stands_out(it.colour, wish.background) for it in wish.asked)


def _stands_out(colour: str, background: tuple[str, ...]) -> bool:
    """Against every colour that a gradient passes through."""
    first, last = (COLOURS[name] for name in (background[0], background[-1]))
    return all(
        math.dist(COLOURS[colour], [a + (b - a) * share for a, b in zip(first, last, strict=True)])
        >= LEAST_CONTRAST
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
