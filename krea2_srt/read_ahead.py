"""Weight files are read while other things are imported, so that loading finds them in memory.

A thread reads the files from begin to end, in the order in which they will be loaded, into the
kernel's page cache; the loader maps them and waits for each tensor until it has come by. So the
disk sees one sequential reader, whenever the loader begins. Needs no torch.
"""

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from krea2_srt.host_memory import available_memory

CHUNK = 32 * 2**20
"""Bytes that are read at a time. After each one the thread may wait some milliseconds for Python's
lock, which the imports hold: chunks of a few MB would let a fast disk idle.
"""

_SHARE = 0.5
"""What may have been read and not been loaded yet, of the memory that is available. Files that the
kernel has to drop before they are loaded would be read twice.
"""

_RECHECK_S = 1.0
"""While it may read no further; memory may become free meanwhile."""

Identity = tuple[int, int]
"""Device and inode: a file that replaces another one under its name is another one."""


def read_to_page_cache(descriptor: int, start: int, count: int) -> int:
    """Have the kernel read a piece of a file; nothing is copied into this process.

    Returns:
        Bytes that are there now; 0 at the end of the file.

    Raises:
        OSError: it cannot be read, or its file system cannot do this.
    """
    with open(os.devnull, "wb", buffering=0) as nowhere:
        return os.sendfile(nowhere.fileno(), descriptor, start, count)


def half_of_memory() -> int:
    """Bytes that may be read ahead of the loader, as memory is just now."""
    return int(available_memory() * _SHARE)


@dataclass(frozen=True)
class ReadAheadReport:
    """What was read ahead.

    Attributes:
        bytes_read: by the thread.
        seconds: that it took.
        waited_s: the time for which the loader waited for it.
    """

    bytes_read: int
    seconds: float
    waited_s: float


@dataclass
class _File:
    path: Path
    identity: Identity
    size: int
    read: int = 0
    """Bytes from the beginning that are in the page cache."""
    asked: int = 0
    """Bytes from the beginning that the loader has asked for."""
    descriptor: int = field(default=-1, repr=False)


class ReadAhead:
    """A thread that reads files ahead of a loader; `start` it.

    It ends at the first error, without a word: the loader meets the same one and tells it.

    Args:
        files: in the order in which they will be loaded; what is no regular file is passed over.
        read: as `read_to_page_cache`.
        limit: bytes that may have been read and not been asked for.
    """

    def __init__(
        self,
        files: Iterable[Path],
        *,
        read: Callable[[int, int, int], int] = read_to_page_cache,
        limit: Callable[[], int] = half_of_memory,
    ) -> None:
        found = {each.identity: each for each in map(_regular_file, files) if each is not None}
        self._files = list(found.values())
        self._read = read
        self._limit = limit
        self._at = 0
        """Which file the loader has asked for last; those before it need not be read any more."""
        self._waiting: list[_File] = []
        """Those that a loader waits for at the moment."""
        self._ended = False
        self._changed = threading.Condition()
        self._seconds = self._waited_s = 0.0
        # A daemon: an interpreter that ends does not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def covers(self, files: Iterable[Path]) -> bool:
        """Whether these files are among its own."""
        return all(self._index_of(file) is not None for file in files)

    def wait_for(self, file: Path, end: int) -> None:
        """Return once the file's bytes before ``end`` have been read, or never will be.

        Asking for them says that whatever is before them, and in the files before this one, is
        no longer needed here. A file that is not among its own is not waited for.
        """
        index = self._index_of(file)
        if index is None:
            return
        wanted = self._files[index]
        # A file that was still being copied when this began has grown: no more of it will be read.
        end = min(end, wanted.size)
        with self._changed:
            self._at = index
            wanted.asked = max(wanted.asked, end)
            self._changed.notify_all()
            if wanted.read >= end or self._ended:
                return
            started = time.monotonic()
            self._waiting.append(wanted)
            try:
                self._changed.wait_for(lambda: wanted.read >= end or self._ended)
            finally:
                self._waiting.remove(wanted)
                self._waited_s += time.monotonic() - started

    def stop(self) -> ReadAheadReport:
        """Read no more than what is being read."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            read = sum(file.read for file in self._files)
            return ReadAheadReport(read, self._seconds, self._waited_s)

    def _run(self) -> None:
        try:
            with ExitStack() as opened, suppress(OSError):
                while (file := self._next()) is not None and self._read_some(file, opened):
                    pass
        finally:
            self.stop()

    def _next(self) -> _File | None:
        """The file to go on with, once there is room for more of it; None at the end."""
        with self._changed:
            while not self._ended:
                if (file := next(_unread(self._waiting), None)) is not None:
                    return file
                if (file := next(_unread(self._files[self._at :]), None)) is None:
                    # The loader may still turn back to one that it has passed over.
                    if next(_unread(self._files), None) is None:
                        return None
                elif self._ahead() < self._limit():
                    return file
                self._changed.wait(_RECHECK_S)
        return None

    def _ahead(self) -> int:
        """Bytes that have been read and not been asked for."""
        return sum(max(0, file.read - file.asked) for file in self._files[self._at :])

    def _read_some(self, file: _File, opened: ExitStack) -> bool:
        """Read a chunk; returns whether there was one."""
        if file.descriptor < 0:
            file.descriptor = _open(file)
            opened.callback(os.close, file.descriptor)
        started = time.monotonic()
        count = self._read(file.descriptor, file.read, min(CHUNK, file.size - file.read))
        with self._changed:
            self._seconds += time.monotonic() - started
            file.read += count
            self._changed.notify_all()
        return count > 0

    def _index_of(self, file: Path) -> int | None:
        try:
            identity = _identity(os.stat(file))
        except OSError:
            return None
        places = (i for i, each in enumerate(self._files) if each.identity == identity)
        return next(places, None)


def _unread(files: Iterable[_File]) -> Iterator[_File]:
    return (file for file in files if file.read < file.size)


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino


def _regular_file(path: Path) -> _File | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return _File(path, _identity(found), found.st_size)


def _open(file: _File) -> int:
    """A descriptor of the file, if it is still the same one.

    Raises:
        OSError: it is not, or cannot be opened.
    """
    # Without waiting, should it be a pipe by now.
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if _identity(os.fstat(descriptor)) != file.identity:
        os.close(descriptor)
        raise OSError(f"{file.path} has been replaced")
    return descriptor


_current: ReadAhead | None = None
"""This process's."""


def begin(files: Iterable[Path]) -> None:
    """Begin to read files that will be loaded, unless that is under way."""
    global _current
    wanted = list(files)
    if _current is not None:
        if _current.covers(wanted):
            return
        _current.stop()
    _current = ReadAhead(wanted)
    _current.start()


def wait_for(file: Path, end: int) -> None:
    """Before a loader touches a file's bytes up to ``end``; see `ReadAhead.wait_for`."""
    if (current := _current) is not None:  # another thread may `finish`
        current.wait_for(file, end)


def _forget() -> None:
    global _current
    _current = None


# A forked process has no such thread, and would wait for it without end.
os.register_at_fork(after_in_child=_forget)


def finish() -> ReadAheadReport:
    """All that is needed is loaded, or nothing more will be."""
    global _current
    if _current is None:
        return ReadAheadReport(0, 0.0, 0.0)
    report, _current = _current.stop(), None
    return report
