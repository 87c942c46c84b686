"""The engine as the HTTP process sees it: its live replicas, and which of them gets a request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

import zmq.asyncio

from krea2_server.engine.base import QueueCounts
from krea2_server.engine.channel import ChannelJob, EngineChannel, EngineExitedError
from krea2_server.errors import ENGINE_RETRY_S, ApiError, engine_unavailable
from krea2_srt.messages import (
    AdapterInfo,
    Generated,
    GenerateRequest,
    ModelInfo,
    ProgressUpdate,
    SetAdapterNames,
)
from krea2_srt.routing import ReplicaExited, Replicas, adapters_ms, image_ms

logger = logging.getLogger(__name__)

MODEL_TIMEOUT_S = 120.0
"""For a scheduler that has just said that it is ready."""

POLL_S = 1.0
"""Between two looks at a replica's statistics."""

LOOK_S = 2.0
"""For the answer to who asks for the queue: longer than most units of work."""

LOAD_S = 120.0
"""For an adapter to be read: two gigabytes from a slow disk."""

READY_SILENCE_S = 15.0
"""A replica that has not answered for as long is not ready; units of work are shorter."""


_NEAREST = ("device", "host", "disk")

T = TypeVar("T")


@dataclass
class Replica:
    """A replica's last known state.

    Attributes:
        channel: None while it is down.
        statistics: what its engine last said of itself.
        answered: clock time in seconds of that.
    """

    channel: EngineChannel | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    answered: float = 0.0


class EngineClient:
    """An `Engine` of scheduler processes that this one speaks to.

    Args:
        count: of replicas, none of which is there yet.

    Attributes:
        model: what is served; None before the first replica is there.
        was_asked: whether there has been a request.
    """

    def __init__(self, count: int) -> None:
        self.model: ModelInfo | None = None
        self.was_asked = False
        self.replicas = [Replica() for _ in range(count)]
        self.routing = Replicas(count)
        self._context = zmq.asyncio.Context()
        self._names = SetAdapterNames()
        # Held while names change, and while a replica is told of them.
        self._naming = asyncio.Lock()
        self._pollers: dict[int, asyncio.Task[None]] = {}
        for index in range(count):
            self.routing.mark_dead(index)

    @property
    def num_ready(self) -> int:
        return sum(self.silent_s(index) < READY_SILENCE_S for index in self.routing.live)

    @property
    def num_replicas(self) -> int:
        return len(self.replicas)

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        return {str(index): self.replicas[index].statistics for index in self.routing.live}

    async def queue(self) -> list[QueueCounts]:
        """See `Engine`: each replica is asked.

        Of one whose unit of work takes longer, it is what it last said, and what this process has
        sent there since.
        """
        ready = [i for i in self.routing.live if self.silent_s(i) < READY_SILENCE_S]
        found = await asyncio.gather(*map(self._counts, ready))
        return [counts for counts in found if counts is not None]

    async def _counts(self, index: int) -> QueueCounts | None:
        """What is in a replica; None where it has just gone, with all that was there."""
        replica = self.replicas[index]
        try:
            await self._look(replica, LOOK_S)
        except EngineExitedError:
            return None
        except TimeoutError:
            return QueueCounts.of(replica.statistics, at_least=len(self.routing.loads[index]))
        return QueueCounts.of(replica.statistics)

    async def attach(
        self, index: int, endpoint: str, check: Callable[[ModelInfo], None] = lambda model: None
    ) -> None:
        """A replica has started: ask what it serves, and send it requests.

        Args:
            check: given what it serves; raises if that will not do.

        Raises:
            TimeoutError, EngineExitedError: it does not answer.
        """
        channel = EngineChannel(self._context, endpoint)
        try:
            model = await _model(channel)
            check(model)
            async with self._naming:
                # Before it gets requests; nothing changes meanwhile.
                if self._names != SetAdapterNames():
                    await channel.set_adapter_names(self._names, LOOK_S * 5)
                self.model = model
                self.replicas[index] = Replica(channel, answered=time.monotonic())
                self.routing.mark_live(index)
        except BaseException:
            channel.close()
            raise
        self._pollers[index] = asyncio.create_task(self._poll(self.replicas[index]))

    def detach(self, index: int, reason: str = "the engine has exited") -> None:
        """A replica has gone; its requests fail.

        Args:
            reason: what their clients are told.
        """
        self.routing.mark_dead(index)
        if (poller := self._pollers.pop(index, None)) is not None:
            poller.cancel()
        if (channel := self.replicas[index].channel) is not None:
            channel.close(reason)
        self.replicas[index] = Replica()

    async def disconnected(self, index: int) -> None:
        """Return when the connection to a replica is lost."""
        channel = self.replicas[index].channel
        assert channel is not None
        await channel.disconnected()

    def silent_s(self, index: int) -> float:
        """Seconds since a replica last answered; 0 of one that is down."""
        replica = self.replicas[index]
        return time.monotonic() - replica.answered if replica.channel is not None else 0.0

    async def submit(self, message: GenerateRequest) -> "ClientJob":
        """See `Engine`; it is generated where it waits least."""
        self.was_asked = True
        work = image_ms(message.image, message.image.num_images)
        place = ExitStack()
        try:
            assignment = place.enter_context(
                self.routing.place(work, partial(self._adapters_ms, message))
            )
            channel = self.replicas[assignment.index].channel
            assert channel is not None
            job = await channel.submit(message)
        except BaseException as error:
            place.close()
            match error:
                case ReplicaExited():
                    raise self.unavailable() from None
                case EngineExitedError():
                    raise _exited(error) from None
            raise
        return ClientJob(job, place, partial(self.routing.ahead, assignment))

    async def adapters(self) -> list[AdapterInfo]:
        """See `Engine`."""
        answers = await self._ask_all(lambda channel: channel.adapters(LOOK_S * 5))
        found: dict[str, AdapterInfo] = {}
        for info in (info for infos in answers for info in infos):
            known = found.get(info.name)
            if known is None or _NEAREST.index(info.where) < _NEAREST.index(known.where):
                found[info.name] = info
        return [found[name] for name in sorted(found)]

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """See `Engine`; a replica that starts later is told too."""
        async with self._naming:
            answers = await self._tell_all(lambda c: c.load_adapter(name, path, LOAD_S))
            self._names = self._names.after_load(name, path)
        return answers[0]

    async def unload_adapter(self, name: str) -> None:
        """See `Engine`; a replica that starts later is told too."""
        async with self._naming:
            await self._tell_all(lambda channel: channel.unload_adapter(name, LOAD_S))
            self._names = self._names.after_unload(name)

    async def _tell_all(self, tell: Callable[[EngineChannel], Awaitable[T]]) -> list[T]:
        """What each replica answers that is there; where one does not do it, none does.

        Raises:
            ApiError: one of them refuses or does not answer, or none is there.
        """
        channels = self._channels()
        answers = await asyncio.gather(*map(tell, channels), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if failed:
            again = (c.set_adapter_names(self._names, LOOK_S * 5) for c in channels)
            await asyncio.gather(*again, return_exceptions=True)
            refused = [error for error in failed if isinstance(error, ApiError)]
            raise refused[0] if refused else self.unavailable()
        if not answers:
            raise self.unavailable()
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask_all(self, ask: Callable[[EngineChannel], Awaitable[T]]) -> list[T]:
        """What each replica answers that does.

        Raises:
            ApiError: none does.
        """
        answers = await asyncio.gather(*map(ask, self._channels()), return_exceptions=True)
        found = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not found:
            refused = [error for error in answers if isinstance(error, ApiError)]
            raise refused[0] if refused else self.unavailable()
        return found

    def _channels(self) -> list[EngineChannel]:
        """To the replicas that are there."""
        return [c for i in self.routing.live if (c := self.replicas[i].channel) is not None]

    def unavailable(self) -> ApiError:
        if self.routing.live:
            text = "the engine does not answer"
        else:
            again = "" if self.model is None else " again"
            text = f"the model is being loaded{again}"
        return engine_unavailable(text, ENGINE_RETRY_S)

    def _adapters_ms(self, message: GenerateRequest, index: int) -> int:
        """What it takes a replica to have a request's adapters on its device."""
        return adapters_ms(message.adapters, self.replicas[index].statistics.get("adapters", {}))

    def detach_all(self, reason: str = "the server has shut down") -> None:
        """End everything: all requests fail; see `detach`."""
        for index in range(len(self.replicas)):
            self.detach(index, reason)

    def close(self) -> None:
        self.detach_all()
        self._context.term()

    async def _poll(self, replica: Replica) -> None:
        assert replica.channel is not None
        while True:
            try:
                await self._look(replica, POLL_S * 10)
            except (TimeoutError, EngineExitedError) as error:
                logger.debug("%s has not answered: %s", replica.channel.endpoint, error)
            await asyncio.sleep(POLL_S)

    async def _look(self, replica: Replica, timeout_s: float) -> None:
        assert replica.channel is not None
        replica.statistics = await replica.channel.statistics(timeout_s)
        replica.answered = time.monotonic()


class ClientJob:
    """A `Job` of an `EngineClient`.

    Args:
        job: on the channel of its replica.
        place: its place among that replica's requests, given up when it has ended there.
        count_ahead: see `ahead`.
    """

    def __init__(self, job: ChannelJob, place: ExitStack, count_ahead: Callable[[], int]) -> None:
        self._job = job
        self._place = place
        self._count_ahead = count_ahead

    @property
    def ahead(self) -> int:
        return self._count_ahead()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ProgressUpdate | Generated:
        try:
            update = await anext(self._job)
        except EngineExitedError as error:
            raise _exited(error) from None
        if isinstance(update, Generated):
            # Its replica has done with it, however long its client takes for the answer.
            self._place.close()
        return update

    def close(self) -> None:
        self._job.close()
        self._place.close()


def _exited(error: EngineExitedError) -> ApiError:
    return engine_unavailable(f"{error}; send the request again")


async def _model(channel: EngineChannel) -> ModelInfo:
    """What is served there; an engine that dies with the command in hand replies no more."""
    model = asyncio.create_task(channel.model(MODEL_TIMEOUT_S))
    lost = asyncio.create_task(channel.disconnected())
    try:
        await asyncio.wait((model, lost), return_when=asyncio.FIRST_COMPLETED)
        if not model.done():
            raise EngineExitedError("the connection was lost")
        return model.result()
    finally:
        model.cancel()
        lost.cancel()
        await asyncio.gather(model, lost, return_exceptions=True)
