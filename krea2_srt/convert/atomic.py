"""What appears under its name whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(out: Path) -> None:
    """Check that nothing has the name yet, and that something can get it.

    Raises:
        OSError: it exists, or its folder does not.
    """
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:  # which safetensors, told of it too late, could not read back
        raise OSError(f"{str(out)!r}: the path must be UTF-8") from None
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; nothing is overwritten")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"folder {out.parent} is not writable")


def check_space(out: Path, nbytes: int) -> None:
    """Check that so many bytes can be written.

    Raises:
        OSError: the disk has not that much.
    """
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise OSError(
            f"{out} needs {nbytes / 1e9:.2f} GB, and folder {out.parent} has {free / 1e9:.2f} GB"
        )


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A name beside ``out`` for a file or folder; what is there in the end is renamed to ``out``.

    After an exception it is removed. A process that is killed leaves a hidden folder beside
    ``out``, and nothing under it.

    Raises:
        OSError: see `check_new`.
    """
    check_new(out)
    out = out.resolve()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:64]}.") as scratch:
        work = Path(scratch) / out.name
        yield work
        for folder in (path for path in [work, *work.rglob("*")] if path.is_dir()):
            _flush(folder)
        check_new(out)
        work.rename(out)
        _flush(out.parent)


def _flush(folder: Path) -> None:
    """Make the names in a folder last."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
