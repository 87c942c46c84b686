"""Paths and methods as clients write them: as the one under which a route is known here."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_V1 = "/v1"
_WITHOUT_V1 = re.compile(r"/(images|models|queue|responses|chat)(/|$)")
_AZURE = re.compile(r"/openai/deployments/(?P<name>[^/]+)(?P<path>/.+)")
_SLASHES = re.compile(r"/{2,}")


class KnownPaths:
    """ASGI middleware: slashes too many, a missing ``/v1``, Azure's deployments, and HEAD.

    A HEAD is a GET whose body the server leaves out. What the client has sent stays in the
    request's state, for the log: ``sent``, a method and a path; and Azure's ``deployment``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        known, deployment = known_path(path)
        if known != path or method == "HEAD":
            state = {**scope.get("state", {}), "sent": (method, path), "deployment": deployment}
            scope = {**scope, "path": known, "state": state}
            if method == "HEAD":
                scope["method"] = "GET"
        await self.app(scope, receive, send)


def known_path(path: str) -> tuple[str, str | None]:
    """A path as it is known here, and the deployment that it names."""
    path = _SLASHES.sub("/", path)
    path = path.rstrip("/") or "/"
    deployment = None
    if azure := _AZURE.fullmatch(path):
        deployment, path = azure["name"], _V1 + azure["path"]
    elif path.startswith("/openai/"):
        path = path.removeprefix("/openai")
    if _WITHOUT_V1.match(path):
        path = _V1 + path
    return path, deployment
