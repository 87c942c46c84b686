"""What the moderator asks, whatever answers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from krea2_server.moderation.policy import AddressPolicy, ModelPolicy, Stage


class CheckerError(Exception):
    """A checker cannot answer; holds nothing of what it was asked."""


class Checker(Protocol):
    """Scores contents."""

    @property
    def policy(self) -> ModelPolicy | AddressPolicy:
        """What it checks, and the categories that it must score."""

    async def scores(self, stage: Stage, contents: Sequence[Any]) -> Mapping[str, float]:
        """The highest score of each of the policy's categories over all contents.

        Args:
            stage: one of those in ``policy.checks``.
            contents: texts, or images as files; at least one.

        Raises:
            CheckerError: it cannot say.
        """
