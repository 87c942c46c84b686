"""One engine on one GPU, as a Ray Serve replica."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from ray import serve
from ray.serve.request_router import ReplicaID

from krea2_server.engine.base import Message
from krea2_server.engine.client import EngineClient
from krea2_server.engine.supervisor import Supervisor
from krea2_server.errors import ApiError
from krea2_server.observability.logs import configure_logs
from krea2_server.ray.arguments import RaySettings
from krea2_srt.messages import Accepted, AdapterInfo, Generated, GenerateRequest
from krea2_srt.routing import image_ms

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_CLOSE_S = 40.0


@dataclass(frozen=True)
class Unavailable:
    """The last message of a request whose engine has died, or has not come yet.

    A message, since Ray can carry few exceptions whole.

    Attributes:
        replica: which it was, as routers know it.
        reason: for a person.
    """

    replica: ReplicaID
    reason: str


class EngineReplica:
    """Starts a scheduler process, and starts it anew when it dies; passes requests to it.

    Ray Serve calls what has no other caller here: it asks for health, for what the routers and the
    autoscaler should know, and for an end.

    Args:
        settings: of krea2-serve.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        values = RaySettings(**settings)
        configure_logs(values.log_level, values.log_format)
        self._client = EngineClient(1)
        self._supervisor = Supervisor(values, self._client)
        self._running = asyncio.create_task(self._supervisor.run())
        self._sent: Counter[str] = Counter()
        # Ray Serve sends nothing before this has returned.
        while not self._client.num_ready:
            if self._running.done():
                self._running.result()
            await asyncio.sleep(_POLL_S)

    async def generate(
        self, message: GenerateRequest, source: str
    ) -> AsyncGenerator[Message | Unavailable, None]:
        """Generate: the messages of an engine; the last is `Generated` or `Unavailable`.

        Args:
            source: whose request it is, for `record_routing_stats`.
        """
        work = image_ms(message.image, message.image.num_images)
        self._sent[source] += work
        try:
            with closing(await self._client.submit(message)) as job:
                yield Accepted(message.request_id)
                async for update in job:
                    yield update
        except ApiError as error:
            if error.cause is not None:
                yield Generated(message.request_id, error=error.cause)
            else:
                yield Unavailable(serve.get_replica_context().replica_id, error.message)
        finally:
            self._sent[source] -= work
            if not self._sent[source]:
                del self._sent[source]

    async def adapters(self) -> list[AdapterInfo]:
        """The adapters that its engine serves; none while it is away."""
        try:
            return await self._client.adapters()
        except ApiError:
            return []

    async def check_health(self) -> None:
        """Raise if no engine will come any more: Ray Serve then makes a new replica."""
        if self._running.done():
            self._running.result()
            raise RuntimeError("the engine has ended")

    async def record_replica_metadata(self) -> dict[str, Any]:
        """What the HTTP processes should know from the first moment."""
        assert self._client.model is not None
        return {"model": asdict(self._client.model)}

    async def record_routing_stats(self) -> dict[str, Any]:
        """What routers know: ready or not, the work of each source, the engine's statistics."""
        return {
            "ready": self._client.num_ready > 0,
            "outstanding_ms": dict(self._sent),
            "statistics": self._client.replicas[0].statistics,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `QueueSeconds` goes by."""
        statistics = self._client.replicas[0].statistics
        return {"outstanding_s": float(statistics.get("outstanding_s", 0.0))}

    async def __del__(self) -> None:
        """In order: Ray Serve has waited for the requests."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._supervisor.stop()
        finally:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._client.close()
