"""Local stores for tests, and what their URLs and folders hold."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from krea2_server.storage.local import ExpiredFileError, LocalStore

KEY = b"a key of thirty-two bytes, or so"
BASE_URL = "http://images.example:8000"
PATH = "/v1/images/files"


class Clock:
    """Unix time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def local_store(folder: Path, **options) -> AsyncIterator[LocalStore]:
    defaults = {"signing_key": KEY, "expiry_s": 100.0, "max_bytes": 10**6, "path": PATH}
    store = LocalStore(folder, **{**defaults, **options})
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def parts(url: str) -> tuple[str, str, str]:
    """Name, expiry and signature of a URL."""
    found = urlsplit(url)
    query = parse_qs(found.query, strict_parsing=True)
    assert set(query) == {"expires", "signature"}
    return found.path.rsplit("/", 1)[1], query["expires"][0], query["signature"][0]


def bytes_in(folder: Path) -> int:
    """Bytes of all files, finished or not."""
    found = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # removed meanwhile
            found += file.stat().st_size
    return found


async def read(store: LocalStore, url: str) -> bytes:
    found = await store.get(*parts(url))
    with found.file as file:
        data = file.read()
    assert len(data) == found.size
    return data


def file_of(folder: Path, url: str) -> Path:
    """Where a local store has put an image."""
    name, expires, _ = parts(url)
    return folder / f"{expires}-{name}"


async def holds(store: LocalStore, url: str) -> bool:
    """Whether the image of a URL of ours is still there."""
    try:
        await read(store, url)
    except ExpiredFileError:
        return False
    return True
