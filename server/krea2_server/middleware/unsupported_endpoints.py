"""OpenAI's and A1111's other endpoints, which this model has nothing for."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from krea2_server.errors import invalid

_EDITS = "images cannot be edited, only generated"
_INPUT = "input images are not served yet; POST /sdapi/v1/txt2img generates images"
_TEXT = "POST /v1/images/generations generates images"
_PATHS = {
    "/v1/images/edits": _EDITS,
    "/v1/images/variations": _EDITS,
    "/sdapi/v1/img2img": _INPUT,
    "/sdapi/v1/extra-single-image": _INPUT,
    "/sdapi/v1/extra-batch-images": _INPUT,
    "/sdapi/v1/interrogate": _INPUT,
    "/v1/responses": _TEXT,
    "/v1/chat/completions": _TEXT,
}
"""What to say of each."""

_MAX_BYTES = 2**26
"""Bytes of a body that are read and thrown away: clients send all of it before they look for an
answer.
"""


class UnsupportedEndpoints:
    """ASGI middleware: says what can be done instead, whatever is sent.

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
        text = f"{scope['path']} is not supported: {_PATHS[scope['path']]}"
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
