"""The token budget of a pack: shrinks when memory runs out, and recovers."""

RECOVERY_TURNS = 200
"""Turns without running out of memory after which the budget grows again."""

GROWTH = 1.25


class TokenBudget:
    """Most tokens in a pack.

    Args:
        most: where it starts, and what it never exceeds.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens = most
        self._turns = 0

    def out_of_memory(self, tokens: int) -> None:
        """A pack of ``tokens`` did not fit."""
        self.tokens = max(1, min(self.tokens, tokens // 2))
        self._turns = 0

    def succeeded(self) -> None:
        """A turn went well."""
        if self.tokens == self.most:
            return
        self._turns += 1
        if self._turns == RECOVERY_TURNS:
            self._turns = 0
            self.tokens = min(self.most, max(self.tokens + 1, int(self.tokens * GROWTH)))
