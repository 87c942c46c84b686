"""Shared by the tests of the load tester: one scripted server, and the command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.torch.interpreted_triton  # noqa: F401 (before anything else that imports Triton)
from benchmarks.cli import main
from tests.bench.fake_server import Fake, fake_server


@pytest.fixture(scope="package")
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run krea2-bench in a folder of the test's own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        return int(ended.value.code or 0)

    return run
