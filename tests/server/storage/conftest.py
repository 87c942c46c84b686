"""One S3 server for all tests, a bucket for each."""

import uuid
from collections.abc import Iterator

import httpx
import pytest

from tests.server.storage.s3 import started


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    server, endpoint = started()
    yield endpoint
    server.stop()


@pytest.fixture
def bucket(endpoint) -> str:
    """A new one."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    assert httpx.put(f"{endpoint}/{name}").status_code == 200
    return name
