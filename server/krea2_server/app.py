"""The app: routes, and what is around all of them."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from krea2_server.a1111.routes import PREFIX as A1111_PREFIX
from krea2_server.a1111.routes import a1111_router
from krea2_server.api.adapters import adapters_router
from krea2_server.api.event_schemas import event_components
from krea2_server.api.field_errors import FieldError
from krea2_server.api.images import FILES_PATH, images_router
from krea2_server.api.operations import operations_router
from krea2_server.errors import ApiError, invalid, set_outcome
from krea2_server.keys import Keys
from krea2_server.middleware.body_limit import BoundedBody
from krea2_server.middleware.known_paths import KnownPaths
from krea2_server.middleware.mount_point import MountedRoutes, MountPoint
from krea2_server.middleware.request_context import RequestContext
from krea2_server.middleware.unsupported_endpoints import UnsupportedEndpoints
from krea2_server.playground import playground_files
from krea2_server.services import Services
from krea2_srt.disconnects import CancelOnDisconnect

logger = logging.getLogger(__name__)

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class App(FastAPI):
    """FastAPI, with a stream's events in its description and without what is never sent."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document["components"]["schemas"]
            schemas |= event_components()
            # FastAPI's own form of errors; ours is in `validation_error`.
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        found: dict[str, Any] = super().openapi()
        return found


def create_app(services: Services) -> FastAPI:
    """The whole server, but for its processes."""
    settings = services.settings
    app = App(
        title="krea2-srt",
        description="Krea 2 behind OpenAI's images API.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.include_router(images_router(services))
    app.include_router(operations_router(services))
    app.include_router(adapters_router(services))
    if settings.accept == "common":
        app.include_router(a1111_router(services))
    if settings.playground:
        for path, (content, media_type) in playground_files().items():
            _add_page(app, path, content, media_type)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        set_outcome(request.scope, error.code)
        return error.response(_route_path(request))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        problem = as_api_error(error.errors())
        set_outcome(request.scope, problem.code)
        return problem.response(_route_path(request))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        problem = _from_http(request, error)
        set_outcome(request.scope, problem.code)
        return problem.response(_route_path(request))

    # The last added is the outermost.
    app.add_middleware(MountedRoutes)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(
        BoundedBody,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(UnsupportedEndpoints, body_timeout_s=settings.body_timeout_s)
    app.add_middleware(Authentication, keys=services.keys)
    app.add_middleware(RequestContext, max_requests=settings.max_requests, metrics=services.metrics)
    app.add_middleware(KnownPaths)
    app.add_middleware(MountPoint)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms", "x-should-retry"],
        )
    return app


class Authentication:
    """ASGI middleware: nobody without a key uses the API.

    Before a body is read: one that nobody may send is not worth its memory. What operators ask,
    and the playground's page, is open.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        # The files' URLs are signed: they are keys of their own.
        of_a1111 = path.startswith(A1111_PREFIX + "/")
        if of_a1111 or (path.startswith("/v1/") and not path.startswith(FILES_PATH + "/")):
            headers = dict(scope["headers"])
            try:
                client = self._keys.client(_authorization(headers), basic=of_a1111)
            except ApiError as error:
                await error.answer(scope, receive, send)
                return
            scope["state"]["client"] = client
            scope["state"]["client_name"] = client.name
        await self.app(scope, receive, send)


def _authorization(headers: Mapping[bytes, bytes]) -> str | None:
    """OpenAI's header, or what Azure's and others' clients send in its place."""
    if authorization := headers.get(b"authorization"):
        return authorization.decode("latin-1")
    key = headers.get(b"api-key") or headers.get(b"x-api-key")
    return f"Bearer {key.decode('latin-1')}" if key else None


def _add_page(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    headers = {"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"}

    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=headers)


def _route_path(request: Request) -> str:
    """The path of a request without what the server is mounted at."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """Starlette's own errors."""
    method, path = request.method, request.url.path
    match error.status_code:
        case 404:
            text, code = f"there is no {method} {path}", "unknown_path"
        case 405:
            text, code = f"{path} does not take {method}", "method_not_allowed"
        case _:
            # FastAPI's word for a body that it cannot read at all.
            text, code = "the body cannot be read as JSON", "invalid_json"
    return ApiError(error.status_code, text, code, headers=error.headers or {})


def as_api_error(problems: Any) -> ApiError:
    """The first thing that is wrong with a request.

    Args:
        problems: pydantic's.
    """
    problem = problems[0]
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, FieldError):
        return invalid(reason.field or None, str(reason), reason.code)
    location = [str(part) for part in problem["loc"][1:]]
    match problem["type"]:
        case "json_invalid":
            return invalid(None, "the body is not valid JSON", "invalid_json")
        case "missing" if location:
            name = ".".join(location)
            return invalid(location[0], f"{name} is missing", "missing_parameter")
    if not location:
        return invalid(None, "the body must be a JSON object, sent as application/json")
    return invalid(location[0], f"{location[0]}: {problem['msg']}")
