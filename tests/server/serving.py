"""krea2-serve as a process of its own."""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from krea2_srt.testing.krea2_serve import Krea2Serve
from krea2_srt.testing.processes import START_S, installed
from tests.clients import openai_client

if TYPE_CHECKING:
    from openai import OpenAI

SERVE = installed("krea2-serve")


@dataclass
class Api:
    """A server, wherever it runs.

    Attributes:
        url: without a path.
    """

    url: str

    def client(self, **options: object) -> "OpenAI":
        """The official client; it does not try again by itself."""
        return openai_client(self.url, **options)

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
        process: the HTTP process.
    """

    process: Krea2Serve

    @property
    def log(self) -> str:
        return self.process.log

    @property
    def folder(self) -> Path:
        """Folder of its log and its files."""
        return self.process.log_file.parent

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
    timeout_s: float = START_S,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
) -> Iterator[Served]:
    """`krea2-serve` on a free port; it must end with exit code 0.

    Args:
        folder: for its log and its files.
        ready: whether to wait until it generates, not only until it answers.
    """
    with Krea2Serve(
        folder, flags, environment=environment, ready=ready, start_s=timeout_s
    ) as process:
        yield Served(process.url, process)
