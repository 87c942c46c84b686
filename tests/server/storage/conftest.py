"""One S3 server for all tests, a bucket for each."""

import os
import subprocess
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "images", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
