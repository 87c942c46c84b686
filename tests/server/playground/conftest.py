"""A stand-in for the server, for the tests of the page; those that take `script` need it."""

from collections.abc import Iterator

import pytest

from tests.server.playground.stand_in import Script, StandIn, running


@pytest.fixture(scope="session")
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="session")
def playground_url(stand_in: StandIn) -> Iterator[str]:
    """Where the page is served."""
    with running(stand_in) as url:
        yield url


@pytest.fixture(autouse=True)
def script(stand_in: StandIn) -> Script:
    """What the stand-in does in this test."""
    stand_in.script = Script()
    return stand_in.script
