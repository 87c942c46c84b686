"""Bounds on a request's body: on its size, and on how long it takes to arrive."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from krea2_server.errors import ApiError


class BoundedBody:
    """ASGI middleware.

    Args:
        max_body_bytes: of a request.
        body_timeout_s: for a request's body to arrive.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.answer(scope, receive, send)
            return
        if body is None:
            return

        async def receive_read() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, receive_read, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None of a client that has gone."""
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            text = f"the body did not arrive within {self._body_timeout_s:g} s"
            raise ApiError(408, text, "request_timeout") from None

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self._max_body_bytes} bytes"
        return ApiError(413, text, "request_too_large", retry=False)
