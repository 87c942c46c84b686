"""A contact sheet: pictures side by side, with what differs between them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_CELL = 256
_GAP = 12
_TEXT = 54
_HEAD = 24
_GAIN = 8
"""By which differences are brightened."""


def contact_sheet(
    names: Sequence[str], pictures: Sequence[Sequence[np.ndarray]], captions: Sequence[str]
) -> Image.Image:
    """A row for each prompt: its pictures, then how far each but the last is from the last one.

    Args:
        names: of the configurations; the last is what the others are compared to.
        pictures: uint8 [height, width, 3] of each configuration, for each prompt.
        captions: of the rows.
    """
    titles = [*names, *(f"{name}: difference x {_GAIN}" for name in names[:-1])]
    width = len(titles) * (_CELL + _GAP) + _GAP
    row = _CELL + _TEXT + _GAP
    sheet = Image.new("RGB", (width, _HEAD + _GAP + row * len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (_CELL + _GAP), _GAP), title, fill="black")
    for number, (its, caption) in enumerate(zip(pictures, captions, strict=True)):
        top = _HEAD + _GAP + number * row
        for column, pixels in enumerate((*its, *(_difference(one, its[-1]) for one in its[:-1]))):
            cell = Image.fromarray(pixels)
            cell.thumbnail((_CELL, _CELL))
            sheet.paste(cell, (_GAP + column * (_CELL + _GAP), top))
        text = "\n".join(textwrap.wrap(caption, width // 7)[:3])
        draw.text((_GAP, top + _CELL + 4), text, fill="black")
    return sheet


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    found = np.abs(one.astype(np.int16) - other.astype(np.int16)) * _GAIN
    return found.clip(0, 255).astype(np.uint8)
