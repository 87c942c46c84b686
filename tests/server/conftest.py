"""Servers on an engine that does as told."""

from collections.abc import Iterator

import pytest

from krea2_srt.testing.fake_engine import FakeEngine
from tests.channel import wait_until
from tests.server.serving import Served, serve


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture(scope="session")
def fake_server(
    shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """krea2-serve on a fake engine, for all tests that need no settings of their own; those that do
    share one of their own in each file. `engine` resets the engine.
    """
    folder = tmp_path_factory.mktemp("fake-server")
    with serve(folder, "--engine-endpoints", shared_engine.endpoint) as running:
        yield running


@pytest.fixture
def engine(shared_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine of all these servers, quick and willing at the start of each test."""
    shared_engine.reset()
    wait_until(lambda: not shared_engine.waiting)
    shared_engine.reset()
    yield shared_engine
    shared_engine.reset()
