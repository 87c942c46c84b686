"""Cancel the handler of a request whose client has gone away.

Starlette runs a handler to its end whether or not anybody waits for the answer, so an abandoned
image would be generated in full. A cancelled handler closes its channel to the scheduler, which
then frees the sequences.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware: a POST is cancelled when its client goes away before the response starts.

    Noticed from the end of the request's body on: until then the handler is reading and is told
    by the server. Once the response has started, telling is the server's affair again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        exchange = _Exchange(receive, send, task)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # As asyncio.timeout does it: of two cancels, ours and the server's, the server's wins.
            if not (exchange.hung_up and task.uncancel() <= cancels):
                raise
        finally:
            exchange.close()


class _Exchange:
    """One request and its response: what the handler receives and sends passes through here."""

    def __init__(self, receive: Receive, send: Send, handler: "asyncio.Task[Any]") -> None:
        self.hung_up = False
        """Whether the handler was cancelled because the client has gone."""
        self._receive = receive
        self._send = send
        self._handler = handler
        self._watcher: asyncio.Task[Message] | None = None
        self._too_late = False

    async def receive(self) -> Message:
        if self._watcher is None:
            # At the handler's own pace: nothing is read ahead and nothing is stored.
            message = await self._receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._watcher = asyncio.create_task(self._watch())
            return message
        # Shielded, since handlers may stop waiting: Request.is_disconnected() does at once.
        return await asyncio.shield(self._watcher)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._too_late = True
        await self._send(message)

    async def _watch(self) -> Message:
        """Wait for what comes after the body: only the disconnect can."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._too_late:
            self.hung_up = True
            self._handler.cancel("the client has disconnected")
        return message

    def close(self) -> None:
        """The handler has ended: from here on there is nothing to cancel."""
        self._too_late = True
        if self._watcher is not None:
            self._watcher.cancel()


def add_to_app(original: Callable[..., Starlette], *args: Any, **kwargs: Any) -> Starlette:
    """AROUND hook of a function that makes an app: the same app, watched from outermost."""
    app = original(*args, **kwargs)
    app.add_middleware(CancelOnDisconnect)
    return app
