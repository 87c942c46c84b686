"""The deployment that a drill breaks: krea2-serve on this machine, on loopback."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from krea2_srt.testing.krea2_serve import Krea2Serve

_STARTED = re.compile(r"engine (\d+): starting, process (\d+)")
_START_S = 1200.0
_END_S = 600.0

# bfloat16 takes minutes on CPUs without its instructions, and on a busy machine everything is
# estimated to take long.
_ON_A_CPU = (
    "--sglang-args=--dit-precision fp32 --vae-precision fp32 --text-encoder-precisions fp32",
    "--engine.max-queue-s=2000",
)


class Deployment(Krea2Serve):
    """A context: the server runs in it, and is ready when it begins.

    Args:
        model: folder of the checkpoint.
        folder: for the log and the images.
        flags: of krea2-serve.
        wrapper: a command that runs it.
        environment: variables that it gets too.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        flags: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        engine = () if "--engine-endpoints" in flags else _ON_A_CPU
        super().__init__(
            folder,
            ["--model-path", str(model), *engine, *flags],
            wrapper=wrapper,
            environment=environment,
            start_s=_START_S,
            end_s=_END_S,
        )

    def wait_until_up(self) -> None:
        super().wait_until_up()
        self.wait_until_ready()

    @property
    def server(self) -> psutil.Process:
        """The HTTP process."""
        return psutil.Process(self.pid)

    def engines(self) -> list[psutil.Process]:
        """The scheduler processes by replica, each as last started, as the log says."""
        return [psutil.Process(int(pid)) for pid in dict(_STARTED.findall(self.log)).values()]

    def queue(self) -> dict[str, Any]:
        """``/v1/queue``."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/v1/queue", timeout=30).json()
        return answer

    def generate(self, **fields: object) -> httpx.Response:
        """POST /v1/images/generations."""
        body = {"prompt": "x", "seed": 1, **fields}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=_START_S)

    def wait_until_ready(self, replicas: int | None = None, timeout_s: float = _START_S) -> None:
        """Until so many replicas generate; all of them by default."""

        def ready() -> bool:
            queue = self.queue()
            return bool(queue["replicas_ready"] >= (replicas or queue["replicas"]))

        self.wait_until(ready, "the replicas are ready", timeout_s)
