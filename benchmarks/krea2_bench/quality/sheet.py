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
    names: tuple[str, str],
    pictures: Sequence[tuple[np.ndarray, np.ndarray]],
    captions: Sequence[str],
) -> Image.Image:
    """A row for each pair: first, second, and the size of their difference times eight."""
    width = 3 * _CELL + 4 * _GAP
    row = _CELL + _TEXT + _GAP
    sheet = Image.new("RGB", (width, _HEAD + _GAP + row * len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate((*names, f"difference, x {_GAIN}")):
        draw.text((_GAP + column * (_CELL + _GAP), _GAP), name, fill="black")
    for number, ((first, second), caption) in enumerate(zip(pictures, captions, strict=True)):
        top = _HEAD + _GAP + number * row
        difference = np.abs(first.astype(np.int16) - second.astype(np.int16)) * _GAIN
        cells = (first, second, difference.clip(0, 255).astype(np.uint8))
        for column, pixels in enumerate(cells):
            cell = Image.fromarray(pixels)
            cell.thumbnail((_CELL, _CELL))
            sheet.paste(cell, (_GAP + column * (_CELL + _GAP), top))
        text = "\n".join(textwrap.wrap(caption, width // 7)[:3])
        draw.text((_GAP, top + _CELL + 4), text, fill="black")
    return sheet
