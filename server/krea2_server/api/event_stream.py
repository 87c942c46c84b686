"""Server-sent events: the text of an event, and the response that sends them."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"


def event(name: str, data: bytes) -> bytes:
    """An event, whose data is JSON.

    Without ``id:`` lines: the official client takes a comment after one for an event without data.
    """
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """What clients pass over, and what keeps a silent connection open."""
    return b": " + text.encode() + b"\n\n"


class EventStreamResponse(Response):
    """Sends what a generator yields; ends it at once when the client hangs up.

    Args:
        chunks: closed in any case; what it raises breaks the connection, so it should tell the
            client of any failure itself.
        close: called after that in any case, also where they have not begun.
    """

    media_type = MEDIA_TYPE

    def __init__(self, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        # Proxies must neither keep it nor collect it.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send_all(send))
        watcher = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            if not sender.done():
                sender.cancel()
            try:
                await asyncio.gather(watcher, sender, return_exceptions=True)
                # A task that is cancelled before its first step closes nothing.
                await self._chunks.aclose()
            finally:
                # Also where a second cancel comes meanwhile.
                self._close()
        if not sender.cancelled():
            sender.result()

    async def _send_all(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
