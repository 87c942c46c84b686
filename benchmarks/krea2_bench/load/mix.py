"""What clients ask for: weighted kinds of requests."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from krea2_srt.errors import Krea2Error

_SIZE = re.compile(r"(\d+)x(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")

SYNTAX = "SIZE[:steps=N][:n=N][:prompt=TOKENS-TOKENS][:priority=N][:weight=W], …"


class MixError(Krea2Error):
    """A mix that cannot be; the message names what is wrong with it."""


@dataclass(frozen=True)
class Kind:
    """Requests that are alike, and how many of all they are.

    Attributes:
        width, height: pixels.
        steps: denoising steps; None leaves them to the server.
        n: images of a request.
        prompt_tokens: fewest and most tokens of a prompt.
        priority: as the server understands it; 0 is not sent.
        weight: share of the requests, relative to the other weights.
    """

    width: int
    height: int
    steps: int | None = None
    n: int = 1
    prompt_tokens: tuple[int, int] = (0, 512)
    priority: int = 0
    weight: float = 1.0

    @property
    def size(self) -> str:
        """As clients write it; figures are given by it."""
        return f"{self.width}x{self.height}"

    @property
    def megapixels(self) -> float:
        """Megapixels of all images of a request."""
        return self.n * self.width * self.height / 1e6

    @property
    def work(self) -> str:
        """What decides how long a request takes alone, for a person: size, steps, images."""
        steps = "" if self.steps is None else f" {self.steps} steps"
        return f"{self.size}{steps}" + (f" n={self.n}" if self.n > 1 else "")


def parse_mix(text: str) -> tuple[Kind, ...]:
    """Read a mix as `SYNTAX` says.

    Raises:
        MixError: naming the kind and the value that is wrong.
    """
    kinds = tuple(_parse_kind(part.strip()) for part in text.split(","))
    if not any(kind.weight for kind in kinds):
        raise MixError(f"mix: all weights of {text!r} are 0")
    return kinds


def shares(mix: Sequence[Kind], count: int) -> list[int]:
    """How many of ``count`` requests each kind gets: by weight, to the nearest whole numbers that
    add up (largest remainders), so that a short run has its share of rare kinds too.
    """
    total = sum(kind.weight for kind in mix)
    exact = [count * kind.weight / total for kind in mix]
    found = [int(x) for x in exact]
    by_remainder = sorted(range(len(mix)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: count - sum(found)]:
        found[i] += 1
    return found


def _parse_kind(text: str) -> Kind:
    size, *options = text.split(":")
    if (found := _SIZE.fullmatch(size)) is None:
        raise MixError(f"mix: {text!r} begins with no size; expected {SYNTAX}")
    values: dict[str, object] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in _OPTIONS:
            known = ", ".join(f"{known}=" for known in _OPTIONS)
            raise MixError(f"mix: {option!r} of {text!r} is not known; known are {known}")
        field, parse = _OPTIONS[name]
        try:
            values[field] = parse(value)
        except ValueError as error:
            raise MixError(f"mix: {option!r} of {text!r}: {error}") from None
    width, height = (int(side) for side in found.groups())
    if not width or not height:
        raise MixError(f"mix: {text!r} has no pixels")
    return Kind(width, height, **values)  # type: ignore[arg-type]


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError("must be a whole number from 1 on")
    return int(text)


def _priority(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("must be a number from 0 on")
    return value


def _tokens(text: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ValueError("must be a number of tokens, or a range, 3-50")
    low = int(found[1])
    high = int(found[2]) if found[2] else low
    if low > high:
        raise ValueError("ends before it begins")
    return low, high


_OPTIONS = {
    "steps": ("steps", _count),
    "n": ("n", _count),
    "prompt": ("prompt_tokens", _tokens),
    "priority": ("priority", _priority),
    "weight": ("weight", _weight),
}
