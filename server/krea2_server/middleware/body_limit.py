"""Bounds on a request's body: on its size, also unpacked, and on how long it takes to arrive."""

import asyncio
import zlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from krea2_server.errors import ApiError, invalid

_PACKED = ("gzip", "x-gzip", "deflate")
_EITHER_HEADER = 47
"""zlib's window bits for data with a header of gzip's or of its own."""


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
            encoding = _encoding(scope)
            body = await self._read(scope, receive)
            if body is not None and encoding:
                body = self._unpacked(body)
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

    def _unpacked(self, body: bytes) -> bytes:
        decoder = zlib.decompressobj(_EITHER_HEADER)
        try:
            unpacked = decoder.decompress(body, self._max_body_bytes + 1)
        except zlib.error:
            raise invalid(
                None, "the body is not what content-encoding says", "bad_request"
            ) from None
        if len(unpacked) > self._max_body_bytes:
            raise self._too_large()
        if not decoder.eof or decoder.unused_data:
            raise invalid(None, "the body is not what content-encoding says", "bad_request")
        return unpacked

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self._max_body_bytes} bytes"
        return ApiError(413, text, "request_too_large", retry=False)


def _encoding(scope: Scope) -> str:
    """How the body is packed; "" if it is not.

    Raises:
        ApiError: 415, in a way that is not known here.
    """
    named = [value for name, value in scope["headers"] if name == b"content-encoding"]
    encoding = b",".join(named).decode("latin-1").strip().lower()
    if encoding in ("", "identity"):
        return ""
    if encoding not in _PACKED:
        text = f"content-encoding: must be gzip or deflate, or none, got {encoding[:64]!r}"
        raise ApiError(415, text, "unsupported_encoding")
    return encoding
