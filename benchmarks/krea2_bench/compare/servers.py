"""Servers to compare: started here, or running already."""

import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from krea2_srt.errors import Krea2Error
from krea2_srt.testing.processes import ChildProcess, free_ports, installed

START_LIMIT_S = 900.0
"""Loading 34 GB from a slow disk takes minutes."""

END_LIMIT_S = 20.0
"""For a server to end, which nobody is waiting for an answer of."""

PRESENT_LIMIT_S = 1.0
"""For a server that is said to run already."""

POLL_S = 0.3

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PORT = re.compile(r"\{port\d*\}")

PRESETS = {
    "ours": "krea2-serve --model-path {model} --host 127.0.0.1 --port {port} --storage none",
    # An idle SGLang would otherwise keep a core busy, and so slow the others down.
    "sglang": "KREA2_SRT=off sglang serve --model-path {model} --host 127.0.0.1 --port {port} "
    "--scheduler-port {port2} --master-port {port3} --sleep-on-idle --output-path {scratch}",
}
"""Commands that need not be spelled out. Placeholders: {model}, {scratch}, {port}, {port2}, …"""


class ServerError(Krea2Error):
    """A server that cannot be compared; the message names it."""


@dataclass(frozen=True)
class Server:
    """One side of a comparison.

    Attributes:
        name: in tables.
        typed: how it was given, for files of results.
        command: that starts it, with placeholders; empty if it runs already.
        environment: variables of that command.
        url: of one that runs already.
    """

    name: str
    typed: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = ""


def parse_server(text: str) -> Server:
    """``NAME`` of `PRESETS`, or ``NAME=URL``, or ``NAME=[VARIABLE=VALUE …] COMMAND``.

    Raises:
        ServerError: it is none of them.
    """
    name, equals, value = text.partition("=")
    if not equals:
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ServerError(f"--server: {name!r} is neither NAME=COMMAND nor one of {known}")
        value = PRESETS[name]
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ServerError(f"--server: {name!r} is no name; letters, digits, . + - _ are")
    if value.startswith(("http://", "https://")):
        return Server(name, value, url=value.rstrip("/").removesuffix("/v1"))
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ServerError(f"--server: {name}: {error}") from None
    environment = {}
    while words and (found := _ASSIGNMENT.fullmatch(words[0])) is not None:
        environment[found[1]] = found[2]
        words.pop(0)
    if not words:
        raise ServerError(f"--server: {name} has no command")
    if not any("{port}" in word for word in words):
        raise ServerError(f"--server: {name}: its command has no {{port}} to be reached at")
    return Server(name, value, tuple(words), environment)


class Running:
    """A server that has been started, or ran already.

    Args:
        name: of the server.
        url: of it.
        child: its process; None of one that ran already.
    """

    def __init__(self, name: str, url: str, child: ChildProcess | None = None) -> None:
        self.name = name
        self.url = url
        self.child = child
        limit_s = PRESENT_LIMIT_S if child is None else START_LIMIT_S
        self._deadline = time.monotonic() + limit_s

    def ready(self) -> bool:
        """Whether it can generate yet.

        Raises:
            ServerError: it will not come up; the message ends with its log.
        """
        if _ready(self.url):
            return True
        late = time.monotonic() > self._deadline
        if self.child is None and late:
            raise ServerError(f"--server: {self.name}: no server answers at {self.url}")
        if self.child is not None and (late or self.child.ended):
            raise ServerError(str(self.child.error()))
        return False

    def wait_until_ready(self) -> None:
        """Wait for it; raises like `ready`."""
        while not self.ready():
            time.sleep(POLL_S)


@contextmanager
def running(
    server: Server, model: str, scratch: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start a server, which ends with the context.

    Args:
        server: to start, if it does not run already.
        model: stands for ``{model}``.
        scratch: an empty folder; stands for ``{scratch}``, and gets the log.
        environment: further variables.

    Raises:
        ServerError: there is no such command.
    """
    if server.url:
        yield Running(server.name, server.url)
        return
    placeholders = {found[1:-1] for word in server.command for found in _PORT.findall(word)}
    ports = free_ports(sorted(placeholders))
    values = {"model": model, "scratch": str(scratch)} | {k: str(v) for k, v in ports.items()}
    command = [_filled(word, values) for word in server.command]
    command[0] = installed(command[0])
    url = f"http://127.0.0.1:{values['port']}"
    log = scratch / f"{server.name}.log"
    child = ChildProcess(
        command,
        log,
        environment={**server.environment, **(environment or {})},
        apart=True,
        # How a server of somebody else ends is not compared.
        exit_code=None,
        end_s=END_LIMIT_S,
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(child)
        except OSError as error:
            raise ServerError(f"--server: {server.name}: {command[0]}: {error.strerror}") from None
        yield Running(server.name, url, child)


def _filled(word: str, values: Mapping[str, str]) -> str:
    # Not str.format: a command may have braces of its own.
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _ready(url: str) -> bool:
    """By the first of these that the server knows."""
    for path in ("/ready", "/health", "/v1/models"):
        try:
            with urllib.request.urlopen(url + path, timeout=10) as response:
                return bool(response.status == 200)
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403, 404, 405):
                return False
        except OSError:
            return False
    return False
