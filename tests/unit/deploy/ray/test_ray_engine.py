"""Requests over Ray, and what a replica's death does to them: on a handle that does as told."""

import asyncio
from contextlib import closing

import numpy as np
import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from krea2_server.engine.base import QueueCounts
from krea2_server.errors import ApiError
from krea2_server.ray.engine_replica import Unavailable
from krea2_server.ray.fleet import Fleet
from krea2_server.ray.ray_engine import RayEngine
from krea2_srt.messages import (
    Accepted,
    EngineError,
    Generated,
    GenerateRequest,
    ProgressUpdate,
)
from krea2_srt.request import ImageRequest

DEATH = DeploymentUnavailableError(None)


class Response:
    """What a streaming call returns."""

    def __init__(self, script) -> None:
        self._script = iter(script)
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        try:
            step = next(self._script)
        except StopIteration:
            raise StopAsyncIteration from None
        if isinstance(step, BaseException):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """One script for each call."""

    def __init__(self, *scripts) -> None:
        self._scripts = iter(scripts)
        self.messages, self.responses = [], []
        self.generate = self

    def options(self, **_):
        return self

    def remote(self, message, source):
        self.messages.append(message)
        self.responses.append(Response(next(self._scripts)))
        return self.responses[-1]


def message(deadline_s=None) -> GenerateRequest:
    image = ImageRequest("x", 64, 64, 4)
    return GenerateRequest("id", image, "png", 100, 0, deadline_s, True, 1)


def progress(step: int, preview: bool = False) -> ProgressUpdate:
    return ProgressUpdate("id", 0, step, 4, np.zeros((1, 1, 3), np.uint8) if preview else None)


def fleet_of(*replicas: str) -> Fleet:
    fleet = Fleet()
    fleet.update({replica: {} for replica in replicas})
    return fleet


async def collect(engine: RayEngine, wanted: GenerateRequest | None = None) -> list:
    """What comes after it was accepted."""
    with closing(await engine.submit(wanted or message())) as job:
        return [update async for update in job]


def run(handle: Handle, wanted: GenerateRequest | None = None) -> list:
    return asyncio.run(collect(RayEngine(handle, fleet_of("a")), wanted))


UPDATES = [progress(1), progress(2), progress(2, True), progress(3), Generated("id")]
WHOLE = [Accepted("id"), *UPDATES]


def test_updates_pass():
    handle = Handle(WHOLE)
    assert run(handle) == UPDATES
    assert not handle.responses[0].cancelled


@pytest.mark.parametrize("seen", range(6))
def test_after_a_death_the_client_sees_each_update_once(seen):
    handle = Handle([*WHOLE[:seen], DEATH], WHOLE)
    assert run(handle) == UPDATES
    assert [response.cancelled for response in handle.responses] == [True, False]


def test_a_second_death_is_the_clients_error():
    handle = Handle([DEATH], [*WHOLE[:2], DEATH], WHOLE)
    with pytest.raises(ApiError, match="send the request again") as raised:
        run(handle)
    assert (raised.value.status, raised.value.code) == (503, "engine_unavailable")
    assert len(handle.messages) == 2


def test_a_replica_whose_engine_is_down_is_left_for_another():
    lost = Unavailable("a", "the engine has exited")
    assert run(Handle([*WHOLE[:2], lost], WHOLE)) == UPDATES
    with pytest.raises(ApiError, match="the engine has exited") as raised:
        run(Handle([lost], [lost], WHOLE))
    assert (raised.value.status, raised.value.code) == (503, "engine_unavailable")


def test_such_a_replica_is_doubted_though_its_last_report_was_good():
    fleet = Fleet()
    fleet.update({"a": {"ready": True}, "b": {"ready": True, "outstanding_ms": {"other": 999}}})
    assert fleet.ranking(1, ["a", "b"]) == ["a", "b"]
    engine = RayEngine(Handle([Unavailable("a", "the engine has exited")], WHOLE), fleet)
    asyncio.run(collect(engine))
    assert fleet.ranking(1, ["a", "b"]) == ["b", "a"]
    assert engine.num_ready == 1


def test_a_fault_of_the_replica_is_not_tried_again():
    handle = Handle([RayTaskError("generate", "", ValueError("a bug"))], WHOLE)
    with pytest.raises(RayTaskError):
        run(handle)
    assert len(handle.messages) == 1


def test_a_stream_that_ends_in_the_middle_is_tried_again():
    assert run(Handle(WHOLE[:3], WHOLE)) == UPDATES


def test_without_a_replica_nobody_is_kept_waiting():
    handle = Handle(WHOLE)
    with pytest.raises(ApiError, match="the model is being loaded"):
        asyncio.run(collect(RayEngine(handle, Fleet())))
    assert not handle.messages


def test_too_many_requests_are_told_so():
    with pytest.raises(ApiError) as raised:
        run(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]))
    assert (raised.value.status, raised.value.code) == (503, "too_many_requests")


def test_the_second_attempt_has_only_what_is_left_of_the_time():
    handle = Handle([DEATH], WHOLE)
    run(handle, message(deadline_s=1000.0))
    first, second = handle.messages
    assert first.deadline_s == 1000.0
    assert 500.0 < second.deadline_s < 1000.0
    assert second.request_id != first.request_id


def test_whoever_stops_listening_cancels():
    handle = Handle(WHOLE)

    async def listen() -> None:
        with closing(await RayEngine(handle, fleet_of("a")).submit(message())) as job:
            assert await anext(job) == progress(1)

    asyncio.run(listen())
    assert handle.responses[0].cancelled


def test_a_refusal_is_raised_and_not_tried_again():
    refused = Generated("id", error=EngineError("queue_full", "full", retry_after_s=2.0))
    handle = Handle([refused], WHOLE)
    with pytest.raises(ApiError, match="full") as raised:
        run(handle)
    assert (raised.value.status, raised.value.retry_after_s) == (429, 2.0)
    assert len(handle.messages) == 1


def test_the_model_is_what_the_first_replica_says_and_stays():
    limits = {"max_side": 64, "max_pixels": 4096, "max_steps": 8, "max_images": 2}
    fleet = Fleet()
    engine = RayEngine(Handle(), fleet)
    assert engine.model is None
    assert "again" not in engine.unavailable().message
    model = {"path": "x", "distilled": True, "default_steps": 8, "default_guidance": 0.0}
    model |= {"device": "cpu", "dtype": "float32", "attention": "sdpa", "limits": limits}
    model["what_a_newer_one_tells"] = 1
    fleet.update({"a": {"model": model, "statistics": {"steps": 3}}})
    assert engine.model.limits.max_side == 64
    assert (engine.num_ready, engine.num_replicas) == (1, 1)
    assert engine.statistics == {"a": {"steps": 3}}
    fleet.members["a"].load.add(10)
    assert asyncio.run(engine.queue()) == [QueueCounts(0, 1, 0.0)]
    fleet.update({})
    assert engine.model.limits.max_side == 64
    assert engine.num_ready == 0
    assert "again" in engine.unavailable().message
