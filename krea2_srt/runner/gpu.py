"""What is to be known of a GPU before anything runs there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU, at hand or not.

    Attributes:
        free, total: bytes of its memory.
        capability: its compute capability.
    """

    free: int
    total: int
    capability: tuple[int, int]
