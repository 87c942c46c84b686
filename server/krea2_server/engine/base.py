"""The engine, as the rest of the server sees it, wherever it runs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from krea2_server.errors import ApiError, from_engine
from krea2_srt.messages import (
    Accepted,
    AdapterInfo,
    Generated,
    GenerateRequest,
    ModelInfo,
    ProgressUpdate,
)

Message = Accepted | ProgressUpdate | Generated
"""What an engine says of a request."""


class Job(Protocol):
    """A request that the engine has taken: an async iterator of what the engine says of it, of
    which `Generated` is the last.
    """

    @property
    def ahead(self) -> int:
        """Requests that will probably be generated before this one."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> ProgressUpdate | Generated:
        """What the engine says next.

        Raises:
            ApiError: 503, the replica that had it has gone.
        """

    def close(self) -> None:
        """Nobody listens any more: unless it has ended, it ends in the engine too."""


class JobMessages(ABC):
    """What is common to jobs: messages come one by one, `Accepted` or a refusal is the first."""

    _ended = False

    @abstractmethod
    async def receive(self) -> Message:
        """The next message; with `Generated` it has ended."""

    @abstractmethod
    def close(self) -> None:
        """See `Job`."""

    async def until_accepted(self) -> Self:
        """Wait for the first message.

        Raises:
            ApiError: the engine refuses the request.
        """
        try:
            first = await self.receive()
            if isinstance(first, Generated):
                assert first.error is not None, "a request that is done was accepted first"
                raise from_engine(first.error)
        except BaseException:
            self.close()
            raise
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ProgressUpdate | Generated:
        if self._ended:
            raise StopAsyncIteration
        message = await self.receive()
        assert not isinstance(message, Accepted), "a request is accepted once"
        return message


@dataclass(frozen=True)
class QueueCounts:
    """What is in a replica's engine.

    Attributes:
        waiting: requests that have not begun.
        running: requests that have.
        outstanding_s: estimated seconds of work.
    """

    waiting: int
    running: int
    outstanding_s: float

    @classmethod
    def of(cls, statistics: Mapping[str, Any], at_least: int = 0) -> "QueueCounts":
        """What an engine has said of itself.

        Args:
            statistics: its own; empty of one that has said nothing yet.
            at_least: requests that are known to be there, of one that has not said so yet: it is
                busy, so one of them has begun.
        """
        waiting = statistics.get("waiting", 0)
        running = max(statistics.get("requests", 0) - waiting, min(at_least, 1))
        waiting = max(waiting, at_least - running)
        return cls(waiting, running, statistics.get("outstanding_s", 0.0))


class Engine(Protocol):
    """Requests in, pictures out."""

    @property
    def model(self) -> ModelInfo | None:
        """What is served; None before the first replica is there."""

    @property
    def num_replicas(self) -> int:
        """How many there should be."""

    @property
    def num_ready(self) -> int:
        """Replicas that are there and answer."""

    @property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]:
        """What each replica that is there last said of itself, by its name."""

    async def queue(self) -> Sequence[QueueCounts]:
        """What is in each replica that answers, now."""

    async def submit(self, message: GenerateRequest) -> Job:
        """Have a request generated.

        Returns:
            Once the engine has taken it.

        Raises:
            ApiError: it refuses, no replica is there, or the one that was asked has gone.
        """

    async def adapters(self) -> Sequence[AdapterInfo]:
        """What is served, sorted by name; of several replicas, as the one that has it nearest says.

        Raises:
            ApiError: 503, no replica answers.
        """

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Have an adapter read and served, by every replica; see `LoadAdapter`.

        Raises:
            ApiError: it cannot be, or no replica answers.
        """

    async def unload_adapter(self, name: str) -> None:
        """Have an adapter served no more, by any replica.

        Raises:
            ApiError: there is none of this name, or no replica answers.
        """

    def unavailable(self) -> ApiError:
        """What to answer while no replica is there."""
