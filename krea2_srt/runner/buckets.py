"""Which captured graph serves a pack: sizes rounded up so that few graphs serve all packs."""

from bisect import bisect_left
from dataclasses import dataclass

MAX_PADDING = 0.03
"""Share of a step's time that padding may add. From `FEW_TOKENS` on it grows with the tokens, so of
the tokens too.
"""

FEW_TOKENS = 160
"""Below this, a step takes as long as reading the weights, however many tokens there are: on an
H200 up to 184, on GPUs with more arithmetic per byte of bandwidth more."""

_GRANULE = 4
_SMALL_GRANULE = 32


@dataclass(frozen=True)
class GraphKey:
    """What a graph is captured for.

    Attributes:
        tokens: of the padded pack.
        segments: most of them, the padding's own included.
        longest: most tokens of a segment.
        steps: 1 for one step of a pack; for a lone sequence all steps of its schedule.
    """

    tokens: int
    segments: int
    longest: int
    steps: int = 1

    def __str__(self) -> str:
        whole = f", {self.steps} steps" if self.steps > 1 else ""
        segments = f"{self.segments} segments of up to {self.longest}"
        return f"{self.tokens} tokens in up to {segments}{whole}"


class Buckets:
    """The ladder of token counts, and the keys made of it.

    Args:
        max_tokens: the most that a graph takes.
        max_segments: the most that a graph takes, the padding's own included.
    """

    def __init__(self, max_tokens: int, max_segments: int) -> None:
        self.tokens = token_buckets(max_tokens)
        self.max_segments = max_segments

    def key(self, lengths: list[int], steps: int = 1) -> GraphKey | None:
        """The key of a pack of segments of these lengths; None if it is too large for a graph."""
        place = bisect_left(self.tokens, sum(lengths))
        segments = _power_of_two(len(lengths) + 1)
        # A whole schedule has a row for each step where a pack has one for each segment.
        if place == len(self.tokens) or max(segments, steps) > self.max_segments:
            return None
        tokens = self.tokens[place]
        # Attention kernels start work for every segment as if it were the longest. The padding is
        # a segment too, of fewer tokens than the step of the ladder.
        padding = tokens - (self.tokens[place - 1] if place else 0)
        longest = min(tokens, _power_of_two(max(*lengths, padding)))
        return GraphKey(tokens, segments, longest, steps)


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Rising token counts up to exactly ``max_tokens``.

    Any pack is padded to the next one, which costs less than `MAX_PADDING` of its time.
    """
    found = list(range(_SMALL_GRANULE, FEW_TOKENS + 1, _SMALL_GRANULE))
    while found[-1] < max_tokens:
        wider = int(found[-1] * (1 + MAX_PADDING)) // _GRANULE * _GRANULE
        found.append(max(wider, found[-1] + _GRANULE))
    return (*(tokens for tokens in found if tokens < max_tokens), max_tokens)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
