"""Every failure as OpenAI's body: ``{"error": {"message", "type", "param", "code"}}``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from krea2_server.api.spelling import whole_text
from krea2_srt.errors import kind_of
from krea2_srt.messages import EngineError

MAX_RETRY_AFTER_S = 120.0
"""Longer waits the official client does not take: it gives up at once."""

_DETAILED = "/sdapi/"
"""Paths whose clients read ``detail`` and ``errors``, as A1111 has them, beside ``error``."""

ENGINE_RETRY_S = 5.0
"""When to try again an engine that is being started, if nothing better is known."""


@dataclass
class ApiError(Exception):
    """What a client did wrong, or what went wrong here.

    Attributes:
        status: of HTTP.
        message: for a person; holds no secrets, paths or traces.
        code: for a program; docs/server.md lists them.
        param: the request's field that is wrong.
        type: OpenAI's family of the error; by default the status's.
        retry_after_s: when to try again.
        retry: whether the same request can succeed later; None leaves it to the client.
        headers: further ones.
        cause: what the engine said.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    type: str = ""
    retry_after_s: float | None = None
    retry: bool | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cause: EngineError | None = None

    def __post_init__(self) -> None:
        # Whatever clients and engines send, it must get into JSON.
        self.message = whole_text(self.message)
        self.param = self.param and whole_text(self.param)
        super().__init__(self.message)
        self.type = self.type or _type_of(self.status)

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, path: str = "") -> Response:
        """With the headers that tell the official client when to try again.

        Args:
            path: that was asked.
        """
        body = self.body()
        if path.startswith(_DETAILED):
            body |= {"detail": self.message, "errors": self.message}
        headers = dict(self.headers)
        if self.retry_after_s is not None and math.isfinite(self.retry_after_s):
            wait_s = min(max(self.retry_after_s, 0.0), MAX_RETRY_AFTER_S)
            headers["retry-after"] = str(math.ceil(wait_s))
            headers["retry-after-ms"] = str(math.ceil(wait_s * 1e3))
        if self.retry is not None:
            headers["x-should-retry"] = "true" if self.retry else "false"
        return Response(orjson.dumps(body), self.status, headers, "application/json")

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with it before its body is read, which ends the connection."""
        set_outcome(scope, self.code)
        response = self.response(scope["path"])
        # What the client still sends of its body is nobody's request.
        response.headers["connection"] = "close"
        await response(scope, receive, send)


def set_outcome(scope: Scope, outcome: str | None) -> None:
    """Say how a request has ended, for whoever counts it."""
    scope["state"]["outcome"] = outcome


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the request has a value that it cannot have."""
    return ApiError(400, message, code, param)


def internal_error(request_id: str | None) -> ApiError:
    """Something that should not have happened; what, is in the log."""
    text = f"internal server error (request id {request_id})"
    return ApiError(500, text, "internal_error")


def engine_unavailable(message: str, retry_after_s: float = ENGINE_RETRY_S) -> ApiError:
    """No engine is ready; one is being started."""
    return ApiError(503, message, "engine_unavailable", retry_after_s=retry_after_s, retry=True)


# Our request's fields by the engine's names for them.
_FIELDS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "n",
    "deadline_s": "deadline_ms",
    "adapters": "lora",
}


def field_name(engine_field: str) -> str:
    """What the API calls a field of the engine's request."""
    return _FIELDS.get(engine_field, engine_field)


def from_engine(error: EngineError) -> ApiError:
    """What the engine says, as HTTP says it; see `krea2_srt.errors`."""
    kind = kind_of(error.code)
    message, param = kind.public_text or error.message, None
    if error.field:
        param = field_name(error.field)
        if message.startswith(f"{error.field}: "):
            message = param + message.removeprefix(error.field)
    wait_s = None
    if kind.retry:
        wait_s = ENGINE_RETRY_S if error.retry_after_s is None else error.retry_after_s
    return ApiError(
        kind.status,
        message,
        kind.code,
        param,
        retry_after_s=wait_s,
        retry=kind.retry,
        cause=error,
    )


def _type_of(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"
