"""Image files in a folder: never more bytes than allowed, each removed when its time comes."""

import heapq
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from krea2_server.storage.permissions import private_mode
from krea2_server.storage.store import ImagesTooLargeError, StorageFullError
from krea2_srt.images import FORMATS

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_FILE = re.compile(rf"[1-9][0-9]{{0,11}}-[0-9a-f]{{32}}\.(?:{'|'.join(FORMATS)})")
_WRITE_TEST = ".write-test"


class _File(NamedTuple):
    """Sorts by when it goes."""

    expires: int
    number: int
    """In the order of writing."""
    name: str
    size: int


class ImageFolder:
    """Files named by when they expire and what their URL calls them: a restart finds both.

    All but `open_file` is for one thread. Other programs must not write there, not even a second
    server: neither would know what the other has stored.

    Args:
        path: for the images alone; made where it is missing.
        max_bytes: of all files; before another goes beyond it, those that expire first go.

    Attributes:
        num_bytes: of all files.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._files: list[_File] = []
        """A heap."""
        self._num_written = 0

    def open(self, now: float) -> None:
        """Take over what an earlier run has left, but for what is partial, expired or too much.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=private_mode(self.path.parent, 0o700), exist_ok=True)
        # Tried, not asked: permissions say nothing of a file system that is read-only.
        (self.path / _WRITE_TEST).touch()
        (self.path / _WRITE_TEST).unlink()
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if not _FILE.fullmatch(entry.name.removesuffix(_PARTIAL)):
                    continue
                if entry.name.endswith(_PARTIAL):
                    os.unlink(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False), entry.name))
        for about, name in sorted(found, key=lambda file: file[0].st_mtime_ns):
            self._count(name, about.st_size)
        self.remove_expired(now)
        self._make_room(0)

    def check_room(self, num_bytes: int) -> None:
        """See `ImageStore`; any thread may ask."""
        if num_bytes > self._max_bytes:
            raise ImagesTooLargeError("the request's images are larger than all of the storage")

    def add(self, name: str, expires: int, data: bytes, now: float) -> None:
        """Write a file; it is there whole or not at all.

        Args:
            expires: the Unix time from which on it is not needed.

        Raises:
            StorageFullError: there is no room, nor can any be made.
            OSError: it cannot be written.
        """
        self.check_room(len(data))
        self.remove_expired(now)
        self._make_room(len(data))
        file_name = f"{expires}-{name}"
        self._write(file_name, data)
        self._count(file_name, len(data))

    def remove(self, name: str, expires: int) -> None:
        """Remove a file before its time, if it is there."""
        file_name = f"{expires}-{name}"
        file = next((file for file in self._files if file.name == file_name), None)
        # One that cannot be removed stays among the files, and is tried again in its time.
        if file is not None and self._unlink(file):
            self._files.remove(file)
            heapq.heapify(self._files)

    def open_file(self, name: str, expires: int) -> BinaryIO | None:
        """A file, open to be read, if it is still there. Any thread may ask."""
        path = self.path / f"{expires}-{name}"
        try:
            # No link leads out of here, and nothing but a file is read.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            return os.fdopen(descriptor, "rb")
        except OSError:
            return None

    def remove_expired(self, now: float) -> None:
        """Remove the files whose time has come."""
        while self._files and self._files[0].expires <= now:
            self._remove_first()

    def _make_room(self, num_bytes: int) -> None:
        while self._files and self.num_bytes + num_bytes > self._max_bytes:
            self._remove_first()
        if self.num_bytes + num_bytes > self._max_bytes:
            raise StorageFullError("the storage is full")

    def _remove_first(self) -> None:
        self._unlink(heapq.heappop(self._files))

    def _unlink(self, file: _File) -> bool:
        """Whether a file is gone."""
        try:
            (self.path / file.name).unlink(missing_ok=True)
        except OSError as error:
            # It still takes its room, so it is still counted.
            logger.warning("an image could not be removed: %s", error)
            return False
        self.num_bytes -= file.size
        return True

    def _count(self, name: str, size: int) -> None:
        expires = int(name.partition("-")[0])
        heapq.heappush(self._files, _File(expires, self._num_written, name, size))
        self._num_written += 1
        self.num_bytes += size

    def _write(self, name: str, data: bytes) -> None:
        partial = self.path / (name + _PARTIAL)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                # Else a file system may notice only later that it is full, or lose what a name
                # stands for when the power fails.
                os.fsync(file.fileno())
            partial.rename(self.path / name)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
