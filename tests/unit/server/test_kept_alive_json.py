"""A response with spaces ahead, piece by piece, with a generation that ends as it is told."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from krea2_server.api.kept_alive_json import kept_alive_json
from krea2_server.errors import ApiError


class ToldGeneration:
    """Ends in what it is told; like a `Generation` it is closed in any case."""

    def __init__(self) -> None:
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = False

    async def result(self) -> str:
        try:
            return await asyncio.shield(self.end)
        finally:
            self.close()

    def close(self) -> None:
        self.closed = True


class Client:
    """Takes what is sent, and hangs up when it is told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def has_all(self) -> bool:
        return self.sent[-1].get("more_body") is False

    async def until_spaces(self, count: int) -> None:
        while self.body.count(b" ") < count:
            await asyncio.sleep(0)


def run(test: Callable[[ToldGeneration, Client, dict[str, Any]], Awaitable[None]]) -> None:
    async def whole() -> None:
        scope = {"type": "http", "state": {"request_id": "req_1"}}
        generation = ToldGeneration()
        await test(generation, Client(), scope)
        assert generation.closed
        # Else asyncio tells of a failure that nobody has looked at.
        if generation.end.done():
            generation.end.exception()

    asyncio.run(whole())


def pieces(result: str) -> list[bytes]:
    return [b'{"made":"', result.encode(), b'"}']


async def begun(generation: ToldGeneration, client: Client, scope: dict[str, Any]):
    """The response of one that is silent, when two spaces of it have been sent."""
    response = await kept_alive_json(scope, generation, pieces, 1e-4)
    sending = asyncio.create_task(response(scope, client.receive, client.send))
    await client.until_spaces(2)
    return sending


def test_spaces_then_json():
    async def test(generation, client, scope):
        sending = await begun(generation, client, scope)
        generation.end.set_result("x")
        await sending
        assert client.body.startswith(b"  ")
        assert json.loads(client.body) == {"made": "x"}
        assert client.has_all
        assert scope["state"]["outcome"] == "done"

    run(test)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ApiError(503, "no engine", "engine_unavailable"), "engine_unavailable"),
        (RuntimeError("a secret"), "internal_error"),
    ],
)
def test_a_failure_behind_spaces_has_a_body_and_no_end(failure, code):
    async def test(generation, client, scope):
        sending = await begun(generation, client, scope)
        generation.end.set_exception(failure)
        await sending
        assert json.loads(client.body)["error"]["code"] == code
        assert "secret" not in client.body.decode()
        assert not client.has_all
        assert scope["state"]["outcome"] == code

    run(test)


def test_a_failure_before_the_first_space_is_raised():
    async def test(generation, client, scope):
        generation.end.set_exception(ApiError(504, "late", "deadline_exceeded"))
        with pytest.raises(ApiError, match="late"):
            await kept_alive_json(scope, generation, pieces, 3600)

    run(test)


def test_who_is_cancelled_before_the_first_space_closes_it():
    async def test(generation, client, scope):
        waiting = asyncio.create_task(kept_alive_json(scope, generation, pieces, 3600))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(test)


def test_a_client_that_hangs_up_among_spaces_closes_it():
    async def test(generation, client, scope):
        sending = await begun(generation, client, scope)
        client.gone.set()
        await sending
        assert not client.has_all
        assert not generation.end.done()

    run(test)
