"""Real S3 servers, and stores on them."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from krea2_server.storage.fsspec_store import FsspecStore

SECRET = "a-secret-that-nobody-may-read"


def options(endpoint: str, **more: Any) -> dict[str, Any]:
    return {"key": "the-key", "secret": SECRET, "endpoint_url": endpoint, **more}


def started() -> tuple[ThreadedMotoServer, str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return server, f"http://{host}:{port}"


@asynccontextmanager
async def fsspec_store(url: str, endpoint: str, **more: Any) -> AsyncIterator[FsspecStore]:
    store = FsspecStore(url, expiry_s=more.pop("expiry_s", 60), options=options(endpoint), **more)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def is_clean(text: str, caplog: pytest.LogCaptureFixture, endpoint: str) -> bool:
    """Whether neither a message nor our log has secrets or addresses."""
    logged = [record for record in caplog.records if record.name.startswith("server.")]
    text += "".join(logging.Formatter().format(record) for record in logged)
    return SECRET not in text and endpoint.removeprefix("http://") not in text
