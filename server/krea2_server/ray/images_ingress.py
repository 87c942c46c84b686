"""The images server's HTTP side, as a Ray Serve replica: the same app as krea2-serve's."""

import gc
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from krea2_server.app import create_app
from krea2_server.assembly import create_services, load_moderator
from krea2_server.keys import Keys
from krea2_server.observability.logs import configure_logs
from krea2_server.ray.arguments import RaySettings
from krea2_server.ray.fleet import fleet_of_this_process
from krea2_server.ray.ray_engine import RayEngine


@serve.ingress()
class ImagesIngress:
    """Checks, limits, stores and answers; `EngineReplica` generates.

    Args:
        settings: of krea2-serve.
        engines: the engine deployment.
    """

    async def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        values = RaySettings(**settings)
        configure_logs(values.log_level, values.log_format)
        engine = RayEngine(engines, fleet_of_this_process())
        self._stack = AsyncExitStack()
        services = await self._stack.enter_async_context(
            create_services(values, Keys.from_settings(values), load_moderator(values), engine)
        )
        self._app = create_app(services)
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def __del__(self) -> None:
        await self._stack.aclose()
