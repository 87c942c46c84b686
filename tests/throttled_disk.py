"""Stands in for a slow disk below a reading thread: it reads as much as a test allows."""

import os
import threading
from pathlib import Path

PATIENCE_S = 120.0
"""A wait this long is in vain, however busy the machine is."""

UNLIMITED = 2**62


class ThrottledDisk:
    """In place of `krea2_srt.read_ahead.read_to_page_cache`.

    Args:
        allowed: bytes that may be read before anyone allows more.
        piece: bytes that it reads at a time, at most.

    Attributes:
        reads: inode, first byte and byte after the last one of each read.
    """

    def __init__(self, allowed: int = 0, piece: int = 10) -> None:
        self.reads: list[tuple[int, int, int]] = []
        self._allowed = allowed
        self._piece = piece
        self._starving = False
        self._changed = threading.Condition()

    def __call__(self, descriptor: int, start: int, count: int) -> int:
        with self._changed:
            self._starving = not self._allowed
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed, PATIENCE_S), "never allowed"
            self._starving = False
            done = min(count, self._piece, self._allowed)
            self._allowed -= done
            self.reads.append((os.fstat(descriptor).st_ino, start, start + done))
            return done

    def allow(self, count: int = UNLIMITED) -> None:
        with self._changed:
            self._allowed += count
            self._starving = False
            self._changed.notify_all()

    def wait_until_starving(self) -> None:
        """Return once all that is allowed has been read, and more has been asked for."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._starving, PATIENCE_S)

    def bytes_of(self, file: Path) -> list[int]:
        """Places of the bytes of a file in the order in which they have been read."""
        inode = file.stat().st_ino
        return [
            at for found, start, end in self.reads if found == inode for at in range(start, end)
        ]

    def order(self, files: list[Path]) -> list[str]:
        """Names of the files in the order in which they have been read, one after another."""
        names = {file.stat().st_ino: file.name for file in files}
        order = [names[inode] for inode, _, _ in self.reads]
        return [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
