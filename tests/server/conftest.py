"""One server with the real engine for the whole run; servers on an engine that does as told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fake_engine import FakeEngine
from tests.server.serving import Served, serve
from tests.sglang.channel import wait_until

START_TIMEOUT_S = 300

FLOAT32 = "--dit-precision fp32 --vae-precision fp32 --text-encoder-precisions fp32"


@pytest.fixture(scope="session")
def real_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """krea2-serve with the real engine and the demo checkpoint, in float32."""
    flags = ["--model-path", str(demo_model), f"--sglang-args={FLOAT32}"]
    # On a busy machine everything is estimated to take long; refusals have tests of their own.
    flags += ["--engine.max-queue-s", "2000", "--engine.turn-log", "turns.jsonl"]
    folder = tmp_path_factory.mktemp("real-server")
    with serve(folder, *flags, timeout_s=START_TIMEOUT_S) as running:
        yield running


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def fake_server(
    shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """krea2-serve on a fake engine, for all tests of a file; `engine` resets the engine."""
    folder = tmp_path_factory.mktemp("fake-server")
    with serve(folder, "--engine-endpoints", shared_engine.endpoint) as running:
        yield running


@pytest.fixture
def engine(shared_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine of `fake_server`, quick and willing at the start of each test."""
    shared_engine.reset()
    wait_until(lambda: not shared_engine.waiting)
    shared_engine.reset()
    yield shared_engine
    shared_engine.reset()
