"""A replica of the Ray Serve application whose engine starts at once and computes nothing."""

import os
import sys
from typing import Any

from krea2_server.engine import supervisor
from krea2_server.ray.engine_replica import EngineReplica
from krea2_server.settings import Settings
from krea2_srt.testing import fake_worker

STEP_S = 0.05
"""Time of a step: requests of eight are under way for a while, and still several end a second."""


class FakeReplica(EngineReplica):
    """All of `EngineReplica`, its supervisor and the channel; the worker is another program."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        supervisor.worker_command = _command
        await super().__init__(settings)


def _command(settings: Settings, ready_fd: int) -> list[str]:
    command = [sys.executable, "-m", fake_worker.MODULE, "--ready-fd", str(ready_fd)]
    return [*command, "--parent-pid", str(os.getpid()), "--step-s", str(STEP_S)]
