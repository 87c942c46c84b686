"""A response that is made and sent piece by piece."""

import asyncio
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ChunkedJSONResponse(Response):
    """JSON of a known length, whose pieces may be large.

    Between them others have their turn, and a client that takes them slowly is waited for.

    Args:
        pieces: of the body, in order.
    """

    media_type = "application/json"

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = []
        for piece in self._pieces:
            pieces.append(piece)
            await asyncio.sleep(0)
        self.headers["content-length"] = str(sum(map(len, pieces)))
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
