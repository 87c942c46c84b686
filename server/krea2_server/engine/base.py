"""The engine, as the rest of the server sees it, wherever it runs."""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from krea2_server.errors import ApiError
from krea2_srt.messages import Accepted, Generated, GenerateRequest, ModelInfo, ProgressUpdate

Update = Accepted | ProgressUpdate | Generated
"""What the engine says of a request on its way."""


@dataclass(frozen=True)
class QueuePosition:
    """A request's place in the engine.

    Attributes:
        count_ahead: see `ahead`.
    """

    count_ahead: Callable[[], int]

    @property
    def ahead(self) -> int:
        """Requests that will probably be generated before this one."""
        return self.count_ahead()


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

    def generate(self, message: GenerateRequest) -> AsyncGenerator[QueuePosition | Update, None]:
        """First the request's `QueuePosition`, then what the engine says; the last is `Generated`.

        Whoever stops listening before it, or is cancelled, ends the request in the engine too.

        Raises:
            ApiError: 503, no replica is there, or the one that had it has gone.
        """

    def unavailable(self) -> ApiError:
        """What to answer while no replica is there."""
