"""Images in a folder, behind signed URLs that this server answers."""

import asyncio
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from krea2_srt.image_files import MEDIA_TYPES
from server.storage.signatures import is_name, new_name, sign, verify
from server.storage.store import StorageError, StorageFullError

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_SWEEP_S = 60.0


class UnknownFileError(Exception):
    """There is no such image, or the URL is not ours; which, is not told."""


class ExpiredFileError(Exception):
    """The URL was good once."""


@dataclass(frozen=True)
class StoredFile:
    """An image that is there."""

    path: Path
    media_type: str


class LocalStore:
    """An `ImageStore` in a folder.

    Args:
        folder: for the images alone; made where it is missing.
        signing_key: of the URLs. With the same key and folder, URLs outlive a restart.
        expiry_s: life of a URL and its file.
        max_bytes: of all files; beyond it the oldest go.
        path: where this server serves them.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        signing_key: bytes,
        expiry_s: float,
        max_bytes: int,
        path: str = "/v1/images/files",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._key = signing_key
        self._expiry_s = expiry_s
        self._max_bytes = max_bytes
        self._path = path
        self._clock = clock
        self._files: OrderedDict[str, int] = OrderedDict()
        """Sizes in bytes by name, oldest first."""
        self._expires: dict[str, float] = {}
        self._total = 0
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def num_bytes(self) -> int:
        """Of all files, those included that are being written."""
        return self._total

    async def start(self) -> None:
        try:
            found = await asyncio.to_thread(self._scan)
        except OSError as error:
            raise StorageError(f"storage: {self._folder}: {error.strerror}") from None
        for name, size, modified in sorted(found, key=lambda file: file[2]):
            self._add(name, size, modified + self._expiry_s)
        await self._make_room()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        if len(data) > self._max_bytes:
            raise StorageFullError("the image is larger than all of the storage")
        name, expires = new_name(extension), math.ceil(self._clock() + self._expiry_s)
        # Counted before it is written: others that come meanwhile see it.
        self._add(name, len(data), expires)
        try:
            await self._make_room()
            await asyncio.to_thread(self._write, name, data)
        except OSError as error:
            self._drop(name)
            if error.errno in (ENOSPC, EDQUOT):
                raise StorageFullError("the storage is full") from None
            raise StorageError("the image could not be stored") from error
        except BaseException:
            self._drop(name)
            raise
        if name not in self._files:  # it was the oldest by the time that it was written
            await asyncio.to_thread(self._remove, [name])
            raise StorageFullError("the storage is full")
        query = f"expires={expires}&signature={sign(self._key, name, expires)}"
        return f"{base_url}{self._path}/{name}?{query}"

    async def get(self, name: str, expires: str, signature: str) -> StoredFile:
        """The file behind a URL's parts.

        Raises:
            UnknownFileError: they are not of one of our URLs.
            ExpiredFileError: they were, but the time is over, or the file had to go.
        """
        until = verify(self._key, name, expires, signature)
        if until is None:
            raise UnknownFileError
        path = self._folder / name
        if until <= self._clock() or not await asyncio.to_thread(path.is_file):
            raise ExpiredFileError
        return StoredFile(path, MEDIA_TYPES[path.suffix[1:]])

    def _add(self, name: str, size: int, expires: float) -> None:
        self._files[name] = size
        self._expires[name] = expires
        self._total += size

    def _drop(self, name: str) -> None:
        self._total -= self._files.pop(name, 0)
        self._expires.pop(name, None)

    async def _make_room(self) -> None:
        """Remove what has expired, and then the oldest, until all fits."""
        now = self._clock()
        gone = [name for name, expires in self._expires.items() if expires <= now]
        for name in gone:
            self._drop(name)
        while self._files and self._total > self._max_bytes:
            gone.append(oldest := next(iter(self._files)))
            self._drop(oldest)
        if gone:
            await asyncio.to_thread(self._remove, gone)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await self._make_room()

    # In threads.

    def _scan(self) -> list[tuple[str, int, float]]:
        """Name, size and Unix time of change of every image; removes what a crash has left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "is not writable")
        found = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_PARTIAL) and is_name(entry.name.removesuffix(_PARTIAL)):
                os.unlink(entry.path)
            elif is_name(entry.name) and entry.is_file(follow_symlinks=False):
                about = entry.stat(follow_symlinks=False)
                found.append((entry.name, about.st_size, about.st_mtime))
        return found

    def _write(self, name: str, data: bytes) -> None:
        """Under its name only once it is whole."""
        path = self._folder / name
        partial = path.with_name(name + _PARTIAL)
        try:
            partial.write_bytes(data)
            partial.rename(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def _remove(self, names: list[str]) -> None:
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("an image could not be removed: %s", error.strerror)
