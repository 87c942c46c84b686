"""The engine replicas of the application, as the images server's `Engine`."""

import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from krea2_server.engine.base import QueuePosition, Update
from krea2_server.errors import ENGINE_RETRY_S, ApiError, engine_unavailable
from krea2_server.ray.engine_replica import Unavailable
from krea2_server.ray.fleet import SOURCE, Fleet, Member
from krea2_srt.messages import Accepted, Generated, GenerateRequest, ModelInfo, ProgressUpdate
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

    async def generate(
        self, message: GenerateRequest
    ) -> AsyncGenerator[QueuePosition | Update, None]:
        """See `Engine`."""
        yield QueuePosition(lambda: self._fleet.ahead(message.request_id))
        started = time.monotonic()
        seen: set[object] = set()
        for last in (False, True):
            if not self._fleet.members:
                # Ray would keep it until there is one again.
                raise self.unavailable()
            try:
                async with aclosing(self._generate(message, seen)) as updates:
                    async for update in updates:
                        yield update
                return
            except ApiError as error:
                if last or error.code != "engine_unavailable":
                    raise
                logger.warning("%s: %s; trying another replica", message.request_id, error)
            except _LOST as error:
                if last:
                    text = "the engine has exited; send the request again"
                    raise engine_unavailable(text) from None
                name = type(error).__name__
                logger.warning("%s: %s; generating it again", message.request_id, name)
            message = _again(message, time.monotonic() - started)

    def unavailable(self) -> ApiError:
        again = "" if self._model is None else " again"
        return engine_unavailable(f"the model is being loaded{again}", ENGINE_RETRY_S)

    async def _generate(
        self, message: GenerateRequest, seen: set[object]
    ) -> AsyncGenerator[Update, None]:
        """One attempt, without what an earlier one has sent."""
        response = self._handle.generate.remote(message, SOURCE)
        ended = False
        try:
            async for update in response:
                ended = isinstance(update, Generated | Unavailable)
                if isinstance(update, Unavailable):
                    self._fleet.mark_suspect(update.replica)
                    raise engine_unavailable(update.reason)
                if (key := _identity(update)) not in seen:
                    seen.add(key)
                    yield update
        except BackPressureError:
            text = "too many requests are waiting; try again later"
            raise ApiError(
                503, text, "too_many_requests", retry_after_s=ENGINE_RETRY_S, retry=True
            ) from None
        finally:
            if not ended:
                response.cancel()
        if not ended:
            raise engine_unavailable("the engine has stopped in the middle of a request")


def _identity(update: Update) -> object:
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
