"""OpenAI's other image endpoints, which this model has nothing for."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from krea2_server.errors import invalid

_PATHS = frozenset({"/v1/images/edits", "/v1/images/variations"})

_MAX_BYTES = 2**26
"""Bytes of a body that are read and thrown away: clients send all of it before they look for an
answer.
"""


class UnsupportedEndpoints:
    """ASGI middleware: says that images cannot be edited, whatever is sent for that.

    Args:
        body_timeout_s: for a request's body to arrive.
    """

    def __init__(self, app: ASGIApp, body_timeout_s: float) -> None:
        self.app = app
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _PATHS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        await self._throw_away(receive)
        text = f"{scope['path']} is not supported: images cannot be edited, only generated"
        await invalid(None, text, "unsupported_operation").answer(scope, receive, send)

    async def _throw_away(self, receive: Receive) -> None:
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while size < _MAX_BYTES:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    size += len(message["body"])
        except TimeoutError:
            return
