"""The network between the server and an engine on another host stalls, and comes back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from krea2_srt.testing.load import DONE, UNAVAILABLE, Load
from krea2_srt.testing.processes import ChildProcess
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load

# Of RFC 5737, for documentation: nobody's. Both ends are in this machine.
_OURS, _THEIRS = "198.51.100.1", "198.51.100.2"
_PORT = 31999
_SILENCE_S = 10


def _run(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _host() as (namespace, link), _engine(namespace, model, folder):
        endpoint = f"tcp://{_THEIRS}:{_PORT}"
        flags = ["--engine-endpoints", endpoint, "--hang-timeout-s", str(_SILENCE_S)]
        with Deployment(model, folder, flags) as deployment:
            load = Load(deployment.url)
            with under_load(deployment, load):
                load.phase = "during"
                _ip("link", "set", link, "down")
                load.wait_for(3, UNAVAILABLE)
                check(deployment.queue()["replicas_ready"] == 0, "nobody is ready")
                _ip("link", "set", link, "up")
                deployment.wait_until_ready()
                load.phase = "after"
                load.wait_for(5)
            check(set(load.counts()) <= {DONE, UNAVAILABLE}, "a 503, and no other end")
            check(set(load.counts("after")) == {DONE}, "with the network back, images again")
            deployment.wait_until(
                lambda: _idle(deployment), "the engine has nothing left of it", 10
            )


def _idle(deployment: Deployment) -> bool:
    queue = deployment.queue()
    return bool(queue["running"] == queue["waiting"] == 0)


@contextmanager
def _host() -> Iterator[tuple[str, str]]:
    """A network namespace, and our end of the link to it."""
    name = f"krea2-{os.getpid()}"
    link, peer = f"kd{os.getpid() % 10**6}a", f"kd{os.getpid() % 10**6}b"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", link, "type", "veth", "peer", "name", peer, "netns", name)
        _ip("addr", "add", f"{_OURS}/30", "dev", link)
        _ip("link", "set", link, "up")
        _ip("-n", name, "addr", "add", f"{_THEIRS}/30", "dev", peer)
        _ip("-n", name, "link", "set", peer, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield name, link
    finally:
        _ip("netns", "delete", name)


@contextmanager
def _engine(namespace: str, model: Path, folder: Path) -> Iterator[None]:
    """A scheduler on that host, ready."""
    reader, writer = os.pipe()
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "krea2_srt.sglang.worker"]
    command += ["--ready-fd", str(writer), "--parent-pid", str(os.getpid())]
    command += ["--model-path", str(model), "--host", _THEIRS, "--scheduler-port", str(_PORT)]
    with ChildProcess(command, folder / "engine.log", pass_fds=[writer], exit_code=None):
        os.close(writer)
        with os.fdopen(reader) as pipe:
            print(f"  engine at {json.loads(pipe.readline())['endpoint']}")
        yield


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


DRILL = Drill(
    "stall-network",
    "the link to an engine on another host goes down and up (a network namespace)",
    "after --hang-timeout-s its requests get a 503; when it answers again it generates again, and "
    "has kept nothing of what was given up",
    run_alone=_run,
    needs_root=True,
    needs="ip",
)
