"""Sizes as clients write them: in pixels, as a ratio of sides, or by a name."""

import math
import re
from collections.abc import Mapping
from typing import Any

from krea2_server.api.field_errors import FieldError
from krea2_server.api.spelling import lower, shown, whole
from krea2_server.errors import invalid
from krea2_srt.request import SIZE_MULTIPLE

MAX_ASPECT = 3
"""Longest side over shortest, by OpenAI's contract."""

AUTO = "auto"

_PIXELS = re.compile(r"([0-9]{1,6})\s*(?:px)?\s*[x\u00d7*:,;_/ -]\s*([0-9]{1,6})\s*(?:px)?")
_RATIO = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*[:/x]\s*([0-9]{1,3}(?:\.[0-9]{1,3})?)")
_SAME_RATIO = 0.05
"""Relative difference of ratios that are meant to be the same: 1376x768 is 16:9."""

_LARGEST_RATIO_TERM = 64
"""Smaller numbers with a colon between them are no pixels."""

_NAMES = {
    # fal's.
    "square_hd": "1024x1024",
    "square": "512x512",
    "portrait_4_3": "768x1024",
    "portrait_16_9": "576x1024",
    "landscape_4_3": "1024x768",
    "landscape_16_9": "1024x576",
}
_RESOLUTIONS = {"0.5k": 512, "1k": 1024, "2k": 2048}
"""Side of the square that has as many pixels."""

_WANTED = "must be WIDTHxHEIGHT in pixels, a ratio such as 16:9, or auto"


def size_of(value: Any, name: str, *, is_ratio: bool = False) -> str:
    """A client's size as ``WIDTHxHEIGHT``, ``WIDTH:HEIGHT`` for a ratio, or ``auto``.

    Args:
        value: what the client has sent.
        name: of its field.
        is_ratio: whether numbers are a ratio, however large they are.

    Raises:
        FieldError: it is no size.
    """
    if isinstance(value, Mapping) and value.keys() == {"width", "height"}:
        sides = [whole(name, value[side]) for side in ("width", "height")]
        if all(isinstance(side, int) for side in sides):
            return f"{sides[0]}x{sides[1]}"
    written = lower(value)
    if not isinstance(written, str):
        raise FieldError(name, f"{name}: {_WANTED}, got {shown(value)}")
    if written in (AUTO, "default"):
        return AUTO
    if written in _NAMES:
        return _NAMES[written]
    if side := _RESOLUTIONS.get(written):
        return f"{side}x{side}"
    pixels, ratio = _PIXELS.fullmatch(written), _RATIO.fullmatch(written)
    if ratio and (is_ratio or (not pixels or _is_small(ratio))):
        return f"{ratio[1]}:{ratio[2]}"
    if pixels:
        return f"{int(pixels[1])}x{int(pixels[2])}"
    raise FieldError(name, f"{name}: {_WANTED}, got {shown(value)}")


def with_resolution(size: str | None, resolution: Any, name: str) -> str:
    """A size where a client says how many pixels apart from it: ``1K`` or ``2K``.

    Args:
        size: in pixels or a ratio; None is a square.
        resolution: what the client has sent in the field ``name``.

    Raises:
        FieldError: it is no resolution.
    """
    side = _RESOLUTIONS.get(lower(resolution)) if isinstance(resolution, str) else None
    if side is None:
        return size_of(resolution, name)
    if size is None or size == AUTO:
        return f"{side}x{side}"
    if ":" in size:
        width, height = by_ratio(size, side, name)
        return f"{width}x{height}"
    return size


def merged(size: str, other: str) -> str | None:
    """What two fields say of the size: the more exact of them, or None if they do not agree.

    Args:
        size, other: as of `size_of`.
    """
    if size == AUTO or other == AUTO:
        return other if size == AUTO else size
    if (":" in size) == (":" in other):
        return size if size == other else None
    ratio, pixels = (size, other) if ":" in size else (other, size)
    return pixels if has_ratio(*parse_size(pixels), ratio) else None


def has_ratio(width: int, height: int, ratio: str) -> bool:
    """Whether a size in pixels has a ratio, but for its grid."""
    across, down = (float(term) for term in ratio.split(":"))
    return abs(width * down - height * across) <= _SAME_RATIO * height * across


def by_ratio(ratio: str, side: int, name: str) -> tuple[int, int]:
    """Width and height in the grid of a ratio, with about the pixels of a square.

    Args:
        ratio: ``WIDTH:HEIGHT``.
        side: of the square.
        name: of the client's field.

    Raises:
        FieldError: it is longer than 3:1.
    """
    width, height = (float(term) for term in ratio.split(":"))
    if not (width and height and 1 / MAX_ASPECT <= width / height <= MAX_ASPECT):
        text = f"{name}: must be between 1:{MAX_ASPECT} and {MAX_ASPECT}:1, got {ratio}"
        raise FieldError(name, text)
    root = math.sqrt(width / height)
    sides = (side * root, side / root)
    found = [max(1, round(pixels / SIZE_MULTIPLE)) * SIZE_MULTIPLE for pixels in sides]
    while found[0] * found[1] > side * side or max(found) > MAX_ASPECT * min(found):
        found[found.index(max(found))] -= SIZE_MULTIPLE
    return found[0], found[1]


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of ``WIDTHxHEIGHT``.

    Raises:
        ApiError: it is something else.
    """
    width, x, height = text.partition("x")
    if not (x and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise invalid("size", f"size: must be WIDTHxHEIGHT or auto, got {text!r}")
    return int(width), int(height)


def check_aspect(width: int, height: int, param: str) -> None:
    """Refuse what is longer than 3:1.

    Raises:
        ApiError: it is.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise invalid(
            param,
            f"{param}: must be between 1:{MAX_ASPECT} and {MAX_ASPECT}:1, got {width}x{height}",
        )


def _is_small(ratio: re.Match[str]) -> bool:
    return max(float(ratio[1]), float(ratio[2])) < _LARGEST_RATIO_TERM and "x" not in ratio[0]
