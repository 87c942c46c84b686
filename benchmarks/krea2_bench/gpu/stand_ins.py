"""In place of what only a GPU has, so that a trial on a CPU runs all of the benchmark."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention_backends import AttentionBackend
from krea2_srt.runner.graphs import Replay


def repeated(function: Callable[[], object]) -> Replay:
    """In place of a captured graph: the function, called again."""
    function()

    def replay() -> None:
        function()

    return replay


def _by_offsets(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    offsets = segments.cu_seqlens.tolist()
    return sdpa_attention(q, k, v, Segments(segments.cu_seqlens, tuple(pairwise(offsets)), 0))


OFFSETS = AttentionBackend("offsets", _by_offsets, capturable=True)
"""Attention that goes by the offsets in a tensor, as what graphs capture does."""


class Inline:
    """In place of a side stream: work is done when it is started."""

    def start(
        self, function: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> "Inline":
        self._found = function()
        return self

    def result(self) -> tuple[Tensor, ...]:
        return self._found

    def close(self) -> None:
        """Nothing is under way."""
