"""Shared by the tests of the load tester: scripted servers, and the command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.torch.interpreted_triton  # noqa: F401 (before anything else that imports Triton)
from krea2_bench.cli import main
from tests.bench.fake_server import Fake, fake_server
from tests.bench.virtual_time import VirtualServer, VirtualServers


@pytest.fixture(scope="package")
def fake_process() -> Iterator[Fake]:
    """On real sockets, in real time."""
    with fake_server() as server:
        yield server


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> VirtualServers:
    """`fake` and `other`: two servers on a clock of their own."""
    servers = VirtualServers("fake", "other")
    servers.install(monkeypatch)
    return servers


@pytest.fixture
def fake(virtual: VirtualServers) -> VirtualServer:
    return virtual.servers[0]


@pytest.fixture
def other(virtual: VirtualServers) -> VirtualServer:
    return virtual.servers[1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run krea2-bench in a folder of the test's own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        return int(ended.value.code or 0)

    return run
