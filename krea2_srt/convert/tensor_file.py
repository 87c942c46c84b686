"""Safetensors files that are written tensor by tensor, and read back.

The library's own writer has all tensors of a file in memory at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""By their names in a file's header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CHUNK = 16 * 2**20
"""Bytes between two reports of progress; what is copied or compared takes that much memory."""

OnBytes = Callable[[int], object]
"""Called with the number of bytes that are done, again and again."""


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file while it is written, in any order of its tensors.

    Args:
        path: must not exist.
        headers: of all its tensors.
        metadata: what the file says of itself.
        on_bytes: progress.

    Attributes:
        digests: SHA-256 of what was written of each tensor, by name.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        headers: Sequence[TensorHeader],
        metadata: Mapping[str, str],
        on_bytes: OnBytes,
    ) -> None:
        self.path = path
        self.digests: dict[str, bytes] = {}
        self._on_bytes = on_bytes
        # As the library orders them: every tensor starts at a multiple of its element's size.
        ordered = sorted(headers, key=lambda header: -header.dtype.itemsize)
        self._headers = {header.name: header for header in ordered}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset, self._starts = 0, {}
        for one in ordered:
            self._starts[one.name] = offset
            header[one.name] = {
                "dtype": _NAMES[one.dtype],
                "shape": list(one.shape),
                "data_offsets": [offset, offset + one.nbytes],
            }
            offset += one.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file: BinaryIO = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                missing = self._headers.keys() - self.digests.keys()
                assert not missing, f"not written: {sorted(missing)}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of its tensors; dtype and shape are those of its header."""
        header = self._headers[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (header.dtype, header.shape), name
        assert name not in self.digests, name
        digest = hashlib.sha256()
        self._file.seek(self._data + self._starts[name])
        for chunk in _chunks(tensor):
            digest.update(chunk)
            self._file.write(chunk)
            self._on_bytes(len(chunk))
        self.digests[name] = digest.digest()


def check_tensors(path: Path, digests: Mapping[str, bytes], on_bytes: OnBytes) -> None:
    """Read a file from the disk, by the library's own reader, and compare it.

    Args:
        path: of the file.
        digests: `TensorFile.digests`.
        on_bytes: progress.

    Raises:
        OSError: it is not what was written.
    """
    forget_cached(path)
    try:
        with safe_open(path, framework="pt") as opened:
            found = set(opened.keys())
            if found != digests.keys():
                raise _not_as_written(path, ", ".join(sorted(found ^ digests.keys())))
            for name in opened.offset_keys():
                digest = hashlib.sha256()
                for chunk in _chunks(opened.get_tensor(name)):
                    digest.update(chunk)
                    on_bytes(len(chunk))
                if digest.digest() != digests[name]:
                    raise _not_as_written(path, name)
    except SafetensorError as error:
        raise _not_as_written(path, str(error)) from None


def copy_file(source: Path, target: Path, on_bytes: OnBytes) -> bytes:
    """Copy a file durably.

    Returns:
        SHA-256 of what was written.
    """
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("xb") as writing:
        for chunk in _read(reading):
            digest.update(chunk)
            writing.write(chunk)
            on_bytes(len(chunk))
        writing.flush()
        os.fsync(writing.fileno())
    return digest.digest()


def check_file(path: Path, digest: bytes, on_bytes: OnBytes) -> None:
    """Read a file from the disk and compare it with what `copy_file` has written.

    Raises:
        OSError: it is something else.
    """
    forget_cached(path)
    found = hashlib.sha256()
    with path.open("rb") as reading:
        for chunk in _read(reading):
            found.update(chunk)
            on_bytes(len(chunk))
    if found.digest() != digest:
        raise _not_as_written(path, "its bytes")


def forget_cached(path: Path) -> None:
    """Let the system drop what it has of a file in memory, so that the disk is what is read."""
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _not_as_written(path: Path, what: str) -> OSError:
    return OSError(f"{path.name} is not on the disk as it was written: {what}; is the disk sound?")


def _read(reading: BinaryIO) -> Iterable[bytes]:
    return iter(lambda: reading.read(_CHUNK), b"")


def _chunks(tensor: Tensor) -> Iterable[memoryview]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (memoryview(some.numpy()) for some in flat.split(_CHUNK) if len(some))
