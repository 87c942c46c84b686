"""Images in a folder, behind signed URLs that this server answers."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

from krea2_server.storage.image_folder import ImageFolder
from krea2_server.storage.signatures import MIN_KEY_BYTES, new_name, sign, verify
from krea2_server.storage.store import StorageError, StorageFullError
from krea2_srt.images import MEDIA_TYPES

logger = logging.getLogger(__name__)

_NO_ROOM = (ENOSPC, EDQUOT, EFBIG)


class UnknownFileError(Exception):
    """There is no such image, or the URL is not ours; which, is not told."""


class ExpiredFileError(Exception):
    """The URL was good once."""


@dataclass(frozen=True)
class StoredFile:
    """An image that is there.

    Attributes:
        file: open, so that it can be read to its end even if it is removed meanwhile.
        size: in bytes.
        remaining_s: until its URL ends.
    """

    file: BinaryIO
    size: int
    media_type: str
    remaining_s: float


class LocalStore:
    """An `ImageStore` in a folder.

    Args:
        folder: for the images of this server alone; made where it is missing.
        signing_key: of the URLs. With the same key and folder, URLs outlive a restart.
        expiry_s: life of a URL and its file.
        max_bytes: of all files; beyond it the oldest go.
        path: where this server serves them.
        clock: Unix time in seconds.
        sweep_s: between removals of what has expired, where no image comes that does it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        signing_key: bytes,
        expiry_s: float,
        max_bytes: int,
        path: str,
        clock: Callable[[], float] = time.time,
        sweep_s: float = 60.0,
    ) -> None:
        self._folder = ImageFolder(folder, max_bytes)
        self._key = signing_key
        self._expiry_s = expiry_s
        self._path = path
        self._clock = clock
        self._sweep_s = sweep_s
        # One thread changes the folder, one image at a time: what is counted is what is there,
        # even where a client hangs up in the middle of a write.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return self._folder.num_bytes

    async def start(self) -> None:
        if len(self._key) < MIN_KEY_BYTES:
            raise StorageError(f"storage_key: must have at least {MIN_KEY_BYTES} bytes")
        try:
            await self._in_thread(self._folder.open, self._clock())
        except OSError as error:
            raise StorageError(f"storage: {self._folder.path}: {error.strerror}") from None
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Images that are being stored get there."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    def check_room(self, num_bytes: int) -> None:
        self._folder.check_room(num_bytes)

    async def put(self, data: bytes, extension: str, base_url: str) -> str:
        now = self._clock()
        name, expires = new_name(extension), math.ceil(now + self._expiry_s)
        try:
            await self._in_thread(self._folder.add, name, expires, data, now)
        except asyncio.CancelledError:
            # What has begun in the thread goes on there.
            self._remove(name, expires)
            raise
        except OSError as error:
            logger.error("an image could not be stored: %s", error)
            if error.errno in _NO_ROOM:
                raise StorageFullError("the storage is full") from None
            raise StorageError("the image could not be stored") from None
        query = f"expires={expires}&signature={sign(self._key, name, expires)}"
        return f"{base_url}{self._path}/{name}?{query}"

    def discard(self, url: str) -> None:
        parts = urlsplit(url)
        (expires,) = parse_qs(parts.query)["expires"]
        self._remove(parts.path.rpartition("/")[2], int(expires))

    async def get(self, name: str, expires: str | int, signature: str) -> StoredFile:
        """The file behind a URL's parts.

        Raises:
            UnknownFileError: they are not of one of our URLs.
            ExpiredFileError: they were, but the time is over, or the file had to go.
        """
        until = verify(self._key, name, expires, signature)
        if until is None:
            raise UnknownFileError
        if until <= self._clock():
            raise ExpiredFileError
        file = await asyncio.to_thread(self._folder.open_file, name, until)
        if file is None:
            raise ExpiredFileError
        media_type = MEDIA_TYPES[name.rpartition(".")[2]]
        size = os.fstat(file.fileno()).st_size
        return StoredFile(file, size, media_type, until - self._clock())

    def _remove(self, name: str, expires: int) -> None:
        """Remove a file once what the thread has to do before is done."""
        try:
            self._thread.submit(self._folder.remove, name, expires)
        except RuntimeError:  # the store is being closed
            logger.warning("an image is left that nobody was told of; it goes in its time")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            await self._in_thread(self._folder.remove_expired, self._clock())

    async def _in_thread(self, change: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, change, *args)
