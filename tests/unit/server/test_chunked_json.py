"""Responses of many megabytes: others have their turn while they are made."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise

from krea2_server.api.chunked_json import ChunkedJSONResponse


def test_others_have_their_turn_between_any_two_pieces():
    turns, seen, sent = 0, [], []

    def pieces() -> Iterator[bytes]:
        for number in range(8):
            seen.append(turns)
            yield b"%d" % number

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: dict) -> None:
        sent.append(message)

    async def check() -> None:
        beside = asyncio.create_task(count_turns())
        await ChunkedJSONResponse(pieces())({"type": "http"}, None, send)
        beside.cancel()

    asyncio.run(check())
    assert all(later > earlier for earlier, later in pairwise(seen))
    assert (b"content-length", b"8") in sent[0]["headers"]
    assert b"".join(message["body"] for message in sent[1:]) == b"01234567"
