"""The deployment that a drill breaks: krea2-serve on this machine, on loopback."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

_SERVE = Path(sys.executable).parent / "krea2-serve"
_LISTENING = re.compile(r"INFO listening at (http://[^\s;]+)")
_STARTED = re.compile(r"engine (\d+): starting, process (\d+)")
_START_S = 600.0
_END_S = 180.0
_POLL_S = 0.1


class Deployment:
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
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.url = ""
        self._command = [*wrapper, str(_SERVE), "--model-path", str(model), "--port", "0", *flags]
        if "--storage" not in flags:
            self._command += ["--storage", str(folder / "images")]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Self:
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self.wait_until(lambda: self._find_url(), "it listens", _START_S)
            self.wait_until_ready()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def server(self) -> psutil.Process:
        """The HTTP process."""
        return psutil.Process(self._process.pid)

    def engines(self) -> list[psutil.Process]:
        """The scheduler processes by replica, each as last started, as the log says."""
        return [psutil.Process(int(pid)) for pid in dict(_STARTED.findall(self.log)).values()]

    def queue(self) -> dict[str, Any]:
        """``/v1/queue``."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/v1/queue", timeout=30).json()
        return answer

    def draw(self, **fields: object) -> httpx.Response:
        """POST /v1/images/generations."""
        body = {"prompt": "x", "seed": 1, **fields}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=300)

    def wait_until_ready(self, replicas: int | None = None, timeout_s: float = _START_S) -> None:
        """Until so many replicas draw; all of them by default."""

        def ready() -> bool:
            queue = self.queue()
            return bool(queue["replicas_ready"] >= (replicas or queue["replicas"]))

        self.wait_until(ready, "the replicas are ready", timeout_s)

    def wait_until(self, condition: Any, what: str, timeout_s: float = 60.0) -> None:
        """Ask until the answer is yes.

        Raises:
            TimeoutError: it never was.
            RuntimeError: the server has ended meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{self.log[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
            time.sleep(_POLL_S)

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait(_END_S)

    def _find_url(self) -> bool:
        if found := _LISTENING.search(self.log):
            self.url = found[1]
        return bool(self.url)
