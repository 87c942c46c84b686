"""What became of the work that graphs are for: why some of it ran without, and how often."""

import logging
from dataclasses import dataclass, field
from enum import Enum

import torch

from krea2_srt.errors import first_line

logger = logging.getLogger(__name__)


class Eager(Enum):
    """Why something ran kernel by kernel though graphs are on."""

    TOO_LARGE = "too_large"
    """For any graph: too many tokens, segments, prompts or steps."""

    FIRST_USE = "first_use"
    """Its size has not come before, and a capture takes as long as it runs."""

    FAILED = "failed"
    """The capture for its size has failed."""


@dataclass
class GraphRecord:
    """What graphs of one kind have done.

    Attributes:
        kind: what they do, for the log.
        replayed: times that one was.
        eager: times that none was, by the reason.
        failures: of captures: the size in words, and the first line of why.
    """

    kind: str
    replayed: int = 0
    eager: dict[Eager, int] = field(default_factory=lambda: dict.fromkeys(Eager, 0))
    failures: dict[str, str] = field(default_factory=dict)
    _short_of_memory: set[str] = field(default_factory=set)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def failed(self, size: str, error: Exception) -> None:
        """Note that a capture has failed, and say so once."""
        reason = first_line(error)
        self.failures[size] = reason
        if isinstance(error, torch.OutOfMemoryError):
            self._short_of_memory.add(size)
        if (size, reason) not in self._logged:
            self._logged.add((size, reason))
            logger.warning("krea2-srt: %s graphs off for %s: %s", self.kind, size, reason)

    def memory_freed(self) -> None:
        """Captures that failed for want of memory alone may be tried again."""
        for size in self._short_of_memory:
            del self.failures[size]
        self._short_of_memory.clear()
