"""A pack in the making: who may join whom."""

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import Sequence

MIN_GAIN = 0.1
"""A sequence joins a pack only if that takes this much less time than its step alone. Beyond what
fills the device, sharing a forward makes every image in it later and none earlier."""


class PackBuilder:
    """Sequences that step together.

    Args:
        lead: the first one, which may run whatever the limits.
        cost: estimates of time.
        config: limits of a pack.
        max_tokens: of a pack, now.
    """

    def __init__(
        self, lead: Sequence, cost: CostModel, config: EngineConfig, max_tokens: int
    ) -> None:
        self.sequences = [lead]
        self._cost = cost
        self._config = config
        self._max_tokens = max_tokens
        self._tokens, self._squares = _sums(lead)
        self.ms = cost.forward(self._tokens, self._squares)

    def admit(self, sequence: Sequence) -> bool:
        """Take a sequence in, if it fits and gains by it; returns whether it did."""
        if len(self.sequences) >= self._config.max_pack_sequences:
            return False
        more, more_squares = _sums(sequence)
        tokens, squares = self._tokens + more, self._squares + more_squares
        if tokens > self._max_tokens:
            return False
        ms = self._cost.forward(tokens, squares)
        alone_ms = self._cost.forward(more, more_squares)
        if ms > self._config.max_turn_ms or ms - self.ms > (1 - MIN_GAIN) * alone_ms:
            return False
        self.sequences.append(sequence)
        self._tokens, self._squares, self.ms = tokens, squares, ms
        return True


def _sums(sequence: Sequence) -> tuple[int, int]:
    """Tokens, and the squares of its branches' tokens."""
    tokens = squares = 0
    for branch in sequence.tokens:
        tokens += branch
        squares += branch * branch
    return tokens, squares
