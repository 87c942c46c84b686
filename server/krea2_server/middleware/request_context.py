"""What is around every request: its id, its line in the log, and an answer whatever happens."""

import logging
import time
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from krea2_server.errors import ApiError, internal_error, set_outcome
from krea2_server.observability.logs import request_id
from krea2_server.observability.metrics import Metrics

logger = logging.getLogger("krea2_server.access")

_QUIET = frozenset({"/health", "/ready", "/ping", "/metrics", "/v1/queue", "/sdapi/v1/progress"})
"""Asked for every few seconds by machines: told at debug level."""

_COUNTED = frozenset({"/v1/images/generations", "/sdapi/v1/txt2img"})

_MAX_LOGGED_PATH = 200


class RequestContext:
    """ASGI middleware, around all that answers.

    Args:
        max_requests: for images, at a time, beyond which new ones are refused.
        metrics: told how each of them ended.
    """

    def __init__(self, app: ASGIApp, max_requests: int, metrics: Metrics) -> None:
        self.app = app
        self._max_requests = max_requests
        self._metrics = metrics
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        own_id = f"req_{uuid4().hex}"
        token = request_id.set(own_id)
        scope.setdefault("state", {})["request_id"] = own_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = own_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        counted = scope["path"] in _COUNTED and scope["method"] == "POST"
        self._requests += counted
        try:
            if counted and self._requests > self._max_requests:
                text = "too many requests are under way; try again later"
                full = ApiError(503, text, "too_many_requests", retry_after_s=5.0, retry=True)
                await full.answer(scope, receive, send_with_id)
            else:
                await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("a request failed")
            set_outcome(scope, "internal_error")
            if status:
                raise  # the client has half an answer: the connection must break
            await internal_error(own_id).answer(scope, receive, send_with_id)
        finally:
            self._requests -= counted
            if counted:
                # Whoever knows has said so; nobody has where the client was gone before that.
                self._metrics.ended(scope["state"].get("outcome") or "cancelled")
            self._log(scope, status, (time.perf_counter() - started) * 1e3)
            request_id.reset(token)

    def _log(self, scope: Scope, status: int, ms: float) -> None:
        method, path = scope["state"].get("sent") or (scope["method"], scope["path"])
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        if not logger.isEnabledFor(level):
            return
        # Quoted: what a client sends cannot begin a line of its own.
        logger.log(
            level,
            "%s %s",
            method,
            quote(path, safe="/")[:_MAX_LOGGED_PATH],
            extra={
                # 499: the client had gone before an answer was there.
                "status": status or 499,
                "ms": round(ms, 1),
                "client": scope["state"].get("client_name"),
            },
        )
