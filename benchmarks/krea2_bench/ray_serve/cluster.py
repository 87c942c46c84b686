"""A Ray cluster of this machine alone, with the application on it."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil

from krea2_srt.testing.processes import free_ports

if TYPE_CHECKING:
    from krea2_server.ray.engine_replica import EngineReplica

_CPUS = 8
"""That Ray may give away: as a count. The replicas share what cores there are."""

_START_S = 1200.0
_POLL_S = 0.2


class LocalCluster:
    """A context: Ray runs in it.

    Args:
        model: folder of the checkpoint that all replicas serve.
        sglang_args: of the replicas' engines.

    Attributes:
        url: of Ray Serve, without the application's route prefix.
    """

    def __init__(self, model: Path, sglang_args: str = "") -> None:
        self._model = model.resolve()
        self._sglang_args = sglang_args
        self._port = free_ports(["http"])["http"]
        self.url = f"http://127.0.0.1:{self._port}"
        self._route_prefix = "/"

    def __enter__(self) -> Self:
        import ray
        from ray import serve

        # Ray's default niceness, 15, leaves engines a thirtieth of a core that somebody else uses.
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
        # 127.0.0.1: nothing of Ray listens to others.
        ray.init(
            num_cpus=_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def deploy(
        self,
        settings: Mapping[str, Any] | None = None,
        router: str = "work",
        route_prefix: str = "/",
        replica: "type[EngineReplica] | None" = None,
        **arguments: Any,
    ) -> None:
        """Deploy it, or change what is deployed; returns when all replicas are ready.

        Args:
            router: of `krea2_bench.ray_serve.routers`.
            route_prefix: of the paths under which it is reached.
            replica: what the engine deployment is made of; None is `EngineReplica`.
            settings, arguments: of `krea2_server.ray.arguments`, but for what a CPU needs.

        Raises:
            TimeoutError: they do not get ready.
        """
        from ray import serve

        from krea2_bench.ray_serve.routers import ROUTERS
        from krea2_server.ray.app import build_with
        from krea2_server.ray.arguments import Arguments
        from krea2_server.ray.engine_replica import EngineReplica

        values = {
            "model_path": str(self._model),
            "allow_anonymous": True,
            "sglang_args": self._sglang_args,
            # On a busy machine everything is estimated to take long.
            "engine": {"max_queue_s": 2000},
            **(settings or {}),
        }
        arguments = {"gpus": 0, "cpus": 1, "upscale_delay_s": 1, "downscale_delay_s": 5} | arguments
        parsed = Arguments(settings=values, **arguments)
        application = build_with(parsed, ROUTERS[router], replica or EngineReplica)
        serve.run(application, name="krea2", route_prefix=route_prefix)
        self._route_prefix = route_prefix
        self.wait_until_ready(parsed.min_replicas)

    def wait_until_ready(self, count: int) -> None:
        """Until so many replicas generate."""
        deadline = time.monotonic() + _START_S
        while self.queue["replicas_ready"] < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} replicas are not ready after {_START_S:g} s")
            time.sleep(_POLL_S)

    @property
    def queue(self) -> dict[str, Any]:
        """What ``/v1/queue`` says; of an application that does not answer, that nobody is ready."""
        try:
            path = self._route_prefix.rstrip("/") + "/v1/queue"
            answer = httpx.get(self.url + path, timeout=60)
        except httpx.HTTPError:
            return {"replicas_ready": 0}
        found: dict[str, Any] = answer.json() if answer.is_success else {"replicas_ready": 0}
        return found

    def engine_processes(self) -> list[int]:
        """The process of each engine replica, the scheduler's parent."""
        return _children("ray::ServeReplica:krea2:engine")

    def schedulers(self) -> list[int]:
        """The scheduler process of each engine replica."""
        found = [psutil.Process(pid).children() for pid in self.engine_processes()]
        return [scheduler.pid for (scheduler,) in found]


def _children(title: str) -> list[int]:
    """Processes that this one has started, directly or not, by what they call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found
