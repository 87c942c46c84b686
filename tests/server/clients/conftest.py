"""What clients send on their way to the shared server, and what docs/clients.md says they do."""

import json
from collections.abc import Iterator

import pytest

from tests.server.clients.relay import Relay, relay
from tests.server.serving import Served
from tests.unit.server.test_clients import ROWS


@pytest.fixture
def relayed(fake_server: Served) -> Iterator[Relay]:
    """A way to the server on which bodies are seen."""
    with relay(fake_server.url) as found:
        yield found


@pytest.fixture(scope="session")
def page_bodies() -> dict[str, dict]:
    """Each client's body on the page."""
    return {client: json.loads(body) for client, body, _ in ROWS}
