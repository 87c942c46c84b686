"""krea2-serve as a process of its own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI

SERVE = Path(sys.executable).parent / "krea2-serve"
END_TIMEOUT_S = 120

# In a log of text, or of JSON.
_READY = re.compile(r"(?:INFO |\"message\": \")ready: .* at (http://[^\s;\"]+)")
_LISTENING = re.compile(r"(?:INFO |\"message\": \")listening at (http://[^\s;\"]+)")


@dataclass
class Api:
    """A server, wherever it runs.

    Attributes:
        url: without a path.
    """

    url: str

    def client(self, **options: object) -> OpenAI:
        """The official client; it does not try again by itself."""
        values = {"api_key": "unused", "max_retries": 0, "timeout": 300, **options}
        return OpenAI(base_url=f"{self.url}/v1", **values)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=300, **options)

    def post(self, headers: Mapping[str, str] | None = None, **fields: object) -> httpx.Response:
        """POST /v1/images/generations."""
        url = f"{self.url}/v1/images/generations"
        return httpx.post(url, json=fields, headers=headers, timeout=300)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 of one that is not there."""
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        wanted = f"{name}{{{text}}} " if labels else f"{name} "
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(wanted):
                return float(line.removeprefix(wanted))
        return 0.0


@dataclass
class Served(Api):
    """A running krea2-serve.

    Attributes:
        pid: of the HTTP process.
    """

    log_file: Path
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def refuses_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionError:
            return True
        return False


@contextlib.contextmanager
def serve(
    folder: Path,
    *flags: str,
    timeout_s: float = 180,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
) -> Iterator[Served]:
    """`krea2-serve` on a free port; it must end with exit code 0.

    Args:
        folder: for its log and its files.
        ready: whether to wait until it draws, not only until it answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [SERVE, "--port", "0", *flags]
    if not any(flag.startswith("--storage=") or flag == "--storage" for flag in flags):
        command += ["--storage", str(folder / "images")]
    log_file = folder / "log"
    with (
        log_file.open("wb") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            url = _wait_until_up(process, log_file, timeout_s, _READY if ready else _LISTENING)
            yield Served(url, log_file, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert process.returncode == 0, log_file.read_text(errors="replace")[-3000:]


def _wait_until_up(
    process: "subprocess.Popen[bytes]", log_file: Path, timeout_s: float, line: re.Pattern[str]
) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = log_file.read_text(errors="replace")
        assert process.poll() is None, f"krea2-serve has ended:\n{text[-3000:]}"
        if found := line.search(text):
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(f"krea2-serve is not up:\n{log_file.read_text(errors='replace')[-3000:]}")
