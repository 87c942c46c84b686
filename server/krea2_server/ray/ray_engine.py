"""The engine replicas of the application, as the images server's `Engine`."""

import logging
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import ReplicaID

from krea2_server.engine.base import JobMessages, Message, QueueCounts
from krea2_server.errors import ENGINE_RETRY_S, ApiError, engine_unavailable
from krea2_server.ray.engine_replica import Unavailable
from krea2_server.ray.fleet import SOURCE, Fleet, Member
from krea2_srt.messages import (
    Accepted,
    AdapterInfo,
    Generated,
    GenerateRequest,
    ModelInfo,
    ProgressUpdate,
)
from krea2_srt.request import RequestLimits

logger = logging.getLogger(__name__)

_MODEL_FIELDS = {field.name for field in fields(ModelInfo)}

_LOST = (RayActorError, DeploymentUnavailableError, TaskCancelledError)
"""A replica has gone, with what it generated."""


class RayEngine:
    """An `Engine` of Ray Serve replicas. A request whose replica dies is generated again, once.

    The second picture is the first one's equal, so that a client sees nothing but a delay.

    Args:
        handle: of the engine deployment.
        fleet: what the handle's router knows.
    """

    def __init__(self, handle: DeploymentHandle[Any], fleet: Fleet) -> None:
        self._handle = handle.options(stream=True)
        self._fleet = fleet
        self._model: ModelInfo | None = None

    @property
    def model(self) -> ModelInfo | None:
        if self._model is None:
            for member in self._fleet.members.values():
                if (said := member.report.get("model")) is not None:
                    # While versions change, it may tell what this one does not know.
                    known = {name: said[name] for name in _MODEL_FIELDS & said.keys()}
                    known["limits"] = RequestLimits(**said["limits"])
                    self._model = ModelInfo(**known)
        return self._model

    @property
    def num_replicas(self) -> int:
        return len(self._fleet.members)

    @property
    def num_ready(self) -> int:
        return sum(member.ready for member in self._fleet.members.values())

    @property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]:
        return {_name(replica): _report(member) for replica, member in self._fleet.members.items()}

    async def queue(self) -> list[QueueCounts]:
        """See `Engine`: as of the replicas' last reports, and what this process has sent there."""
        members = [member for member in self._fleet.members.values() if member.ready]
        return [QueueCounts.of(_report(member), len(member.load)) for member in members]

    async def submit(self, message: GenerateRequest) -> "RayJob":
        """See `Engine`."""
        return await RayJob(self, message).until_accepted()

    async def adapters(self) -> list[AdapterInfo]:
        """See `Engine`: as one of the replicas says, which all read the same folder."""
        if not self._fleet.members:
            raise self.unavailable()
        try:
            found: list[AdapterInfo] = await self._handle.options(stream=False).adapters.remote()
        except _LOST:
            raise self.unavailable() from None
        return found

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Not possible: Ray Serve starts and ends replicas, and each would have to know."""
        raise _not_on_ray()

    async def unload_adapter(self, name: str) -> None:
        """Not possible; see `load_adapter`."""
        raise _not_on_ray()

    def send(self, message: GenerateRequest) -> DeploymentResponseGenerator[Any]:
        """Give a request to a replica.

        Raises:
            ApiError: 503, none is there.
        """
        if not self._fleet.members:
            # Ray would keep it until there is one again.
            raise self.unavailable()
        return self._handle.generate.remote(message, SOURCE)

    def mark_suspect(self, replica: ReplicaID) -> None:
        """A replica has refused a request, as its engine was away."""
        self._fleet.mark_suspect(replica)

    def ahead(self, request_id: str) -> int:
        """See `Job.ahead`."""
        return self._fleet.ahead(request_id)

    def unavailable(self) -> ApiError:
        again = "" if self._model is None else " again"
        return engine_unavailable(f"the model is being loaded{again}", ENGINE_RETRY_S)


def _not_on_ray() -> ApiError:
    text = "not with Ray Serve; put the file into --lora-dir, or take it out"
    return ApiError(400, text, "unsupported_operation", retry=False)


class RayJob(JobMessages):
    """A `Job` of a `RayEngine`: its messages, each once, from the first attempt or the second.

    Args:
        engine: whose request it is.
        message: what is to be generated.
    """

    def __init__(self, engine: RayEngine, message: GenerateRequest) -> None:
        self._engine = engine
        self._message = message
        self._started = time.monotonic()
        self._seen: set[object] = set()
        self._response: DeploymentResponseGenerator[Any] | None = None
        self._second = self._closed = False

    @property
    def ahead(self) -> int:
        return self._engine.ahead(self._message.request_id)

    def close(self) -> None:
        self._closed = True
        self._drop_response()

    def _drop_response(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.cancel()

    async def receive(self) -> Message:
        """The next message that has not been received.

        Raises:
            ApiError: there is no replica, or two have gone.
        """
        while True:
            try:
                update = await self._receive()
            except ApiError as error:
                over = self._second or self._closed or self._response is None
                if over or error.code != "engine_unavailable":
                    raise
                logger.warning("%s: %s; trying another replica", self._message.request_id, error)
                self._try_again()
            except _LOST as error:
                if self._second or self._closed:
                    text = "the engine has exited; send the request again"
                    raise engine_unavailable(text) from None
                name = type(error).__name__
                logger.warning("%s: %s; generating it again", self._message.request_id, name)
                self._try_again()
            else:
                if (key := _identity(update)) not in self._seen:
                    self._seen.add(key)
                    return update

    async def _receive(self) -> Message:
        """The next message of this attempt."""
        if self._response is None:
            self._response = self._engine.send(self._message)
        try:
            update: Message | Unavailable = await anext(self._response)
        except StopAsyncIteration:
            text = "the engine has stopped in the middle of a request"
            raise engine_unavailable(text) from None
        except BackPressureError:
            text = "too many requests are waiting; try again later"
            raise ApiError(
                503, text, "too_many_requests", retry_after_s=ENGINE_RETRY_S, retry=True
            ) from None
        if isinstance(update, Unavailable):
            self._engine.mark_suspect(update.replica)
            raise engine_unavailable(update.reason)
        if isinstance(update, Generated):
            self._ended, self._response = True, None
        return update

    def _try_again(self) -> None:
        self._drop_response()
        self._second = True
        self._message = _again(self._message, time.monotonic() - self._started)


def _identity(update: Message) -> object:
    match update:
        case ProgressUpdate():
            return update.sequence, update.step, update.preview is not None
        case Accepted():
            return "accepted"
        case Generated():
            return "generated"


def _again(message: GenerateRequest, spent_s: float) -> GenerateRequest:
    """The same, with what is left of its time, and not to be taken for the first attempt."""
    left_s = None if message.deadline_s is None else max(message.deadline_s - spent_s, 1e-3)
    return replace(message, request_id=f"{message.request_id}.2", deadline_s=left_s)


def _name(replica: Any) -> str:
    return str(getattr(replica, "unique_id", replica))


def _report(member: Member) -> Mapping[str, Any]:
    said: Mapping[str, Any] = member.report.get("statistics", {})
    return said
