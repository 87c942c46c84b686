"""Adapters that operators load and unload: by all replicas or by none, and after a restart too."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from krea2_server.engine.client import EngineClient
from krea2_server.errors import ApiError
from krea2_srt.errors import RequestError
from krea2_srt.messages import EngineError, SetAdapterNames
from krea2_srt.testing.fake_engine import FakeEngine


def with_client(engines: list[FakeEngine], work: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = EngineClient(len(engines))
        try:
            for index, engine in enumerate(engines):
                await client.attach(index, engine.endpoint)
            await work(client)
        finally:
            client.close()

    asyncio.run(run())


@pytest.fixture
def engines():
    with FakeEngine() as first, FakeEngine() as second:
        yield [first, second]


def test_all_replicas_are_told_and_those_that_start_later_too(engines):
    async def work(client: EngineClient) -> None:
        await client.load_adapter("brown", "acme/sepia.safetensors")
        await client.load_adapter("ink", "")
        await client.unload_adapter("ink")
        assert all("brown" in engine.adapters for engine in engines)
        client.detach(1)
        await client.attach(1, engines[1].endpoint)
        assert engines[1].names == SetAdapterNames(
            frozenset({("brown", "acme/sepia")}), frozenset({"ink"})
        )
        await client.load_adapter("ink", "ink.safetensors")
        await client.unload_adapter("brown")
        client.detach(0)
        await client.attach(0, engines[0].endpoint)
        assert engines[0].names == SetAdapterNames(frozenset(), frozenset({"brown"}))

    with_client(engines, work)


def test_where_one_replica_refuses_none_does_it(engines):
    engines[1].load_error = EngineError.of(RequestError("lora_name", "is another adapter's"))

    async def work(client: EngineClient) -> None:
        with pytest.raises(ApiError, match="lora_name: is another adapter's"):
            await client.load_adapter("brown", "sepia")
        assert [engine.names for engine in engines] == [SetAdapterNames()] * 2, "as before"

    with_client(engines, work)


def test_commands_and_starts_wait_for_each_other(engines):
    async def work(client: EngineClient) -> None:
        client.detach(1)
        names = [f"adapter-{number}" for number in range(20)]
        await asyncio.gather(
            client.attach(1, engines[1].endpoint),
            *(client.load_adapter(name, "sepia") for name in names),
        )
        told = {name for name, _ in engines[1].names.aliases} if engines[1].names else set()
        assert told | engines[1].adapters.keys() >= set(names), "each is known there, either way"

    with_client(engines, work)
