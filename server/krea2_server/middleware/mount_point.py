"""A server that is mounted under a prefix of the path, as by Ray Serve's ``route_prefix``."""

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_MOUNT = "mount_point"
_WITHOUT_SLASH = "mount_point_without_slash"


class MountPoint:
    """ASGI middleware, outermost: takes ASGI's ``root_path`` off the path.

    So that all behind it, such as who asks for keys, sees one path, wherever the server is mounted.
    `MountedRoutes` puts it back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "").rstrip("/")
        if scope["type"] != "http" or not prefix:
            await self.app(scope, receive, send)
            return
        path = sent = scope["path"]
        if path == prefix or path.startswith(prefix + "/"):
            path = path.removeprefix(prefix) or "/"
        state = {**scope.get("state", {}), _MOUNT: prefix, _WITHOUT_SLASH: sent == prefix}
        await self.app({**scope, "path": path, "root_path": "", "state": state}, receive, send)


class MountedRoutes:
    """ASGI middleware, innermost: the path as ASGI has it, for routes and their description."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        prefix = state.get(_MOUNT)
        if prefix and state[_WITHOUT_SLASH] and scope["method"] == "GET":
            # The page's files are beside it, so its path has to end with a slash. Relative: a
            # proxy may have taken off another prefix.
            await RedirectResponse(prefix.rpartition("/")[2] + "/")(scope, receive, send)
            return
        if prefix:
            scope = {**scope, "path": prefix + scope["path"], "root_path": prefix}
        await self.app(scope, receive, send)
