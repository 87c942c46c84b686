"""The official client in tests: each is closed when its test has ended.

Left to the collector of cycles, which an exception's traceback makes of it, its socket may go
first, unclosed.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from openai import OpenAI

_clients = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def _closed_clients() -> Iterator[None]:
    yield
    _clients.close()


def openai_client(url: str, **options: object) -> "OpenAI":
    """The official client; it does not try again by itself.

    Args:
        url: of the server, without a path.
        options: of the client.
    """
    from openai import OpenAI

    values = {"api_key": "unused", "max_retries": 0, "timeout": 300, **options}
    return _clients.enter_context(OpenAI(base_url=f"{url}/v1", **values))
