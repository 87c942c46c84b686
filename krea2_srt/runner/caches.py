"""Bounds of what a runner remembers on the device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of each cache. The defaults hold, of the released model in bf16, about 80 prompts of
    512 tokens, 37 schedules of 8 steps, and layouts of packs of 260,000 tokens.

    Attributes:
        contexts: fused prompts.
        modulations: of schedules.
        layouts: of packs, and again of the rotations that they are built from.
    """

    contexts: int = 512 * 2**20
    modulations: int = 1024 * 2**20
    layouts: int = 128 * 2**20

    @property
    def total(self) -> int:
        return self.contexts + self.modulations + 2 * self.layouts

    def scaled(self, share: float) -> "CacheBytes":
        """The same proportions in a share of the memory."""
        sizes = (self.contexts, self.modulations, self.layouts)
        return CacheBytes(*(int(size * share) for size in sizes))
