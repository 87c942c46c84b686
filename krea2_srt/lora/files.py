"""Where an adapter's files lie, and what is known of them before a tensor is read."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from krea2_srt.errors import AdapterError, first_line
from krea2_srt.lora.keys import shown
from krea2_srt.lora.limits import Limits

_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


Stamp = tuple[tuple[int, int, int], ...]
"""What differs once one of some files is replaced or written to."""


@dataclass(frozen=True)
class AdapterFiles:
    """The files that make up an adapter.

    Attributes:
        weights: safetensors.
        config: PEFT's, where there is one.
    """

    weights: Path
    config: Path | None

    @classmethod
    def at(cls, path: Path) -> "AdapterFiles":
        """The files of an adapter that is one file, or a folder that PEFT wrote.

        Raises:
            AdapterError: nothing is there, or something that is no adapter.
        """
        if path.is_dir():
            files = cls(path / _PEFT_WEIGHTS, path / _PEFT_CONFIG)
            for file in (files.weights, files.config):
                assert file is not None
                if not file.is_file():
                    raise AdapterError(
                        f"the folder has no {file.name}; if PEFT did not write it, name the file"
                    )
            return files
        if not path.exists():
            raise AdapterError("there is no such file or folder")
        if not path.is_file():
            raise AdapterError("this is no file")
        if path.suffix != ".safetensors":
            raise AdapterError(
                f"files of {path.suffix or 'no ending'} are not read, only .safetensors"
            )
        config = path.parent / _PEFT_CONFIG
        # It is that of PEFT's own file, or else of all that lie beside it, as SGLang takes it.
        own = path.name == _PEFT_WEIGHTS or not (path.parent / _PEFT_WEIGHTS).exists()
        return cls(path, config if own and config.is_file() else None)

    def stamp(self) -> Stamp:
        """The stamp of the files as they are now.

        Raises:
            OSError: one is gone.
        """
        found = [file.stat() for file in (self.weights, self.config) if file is not None]
        return tuple((at.st_ino, at.st_size, at.st_mtime_ns) for at in found)

    def digest(self) -> str:
        """SHA-256 of what is in them, in hexadecimal.

        Raises:
            OSError: one cannot be read.
        """
        found = hashlib.sha256()
        for file in (self.weights, self.config):
            if file is not None:
                with file.open("rb") as stream:
                    found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of an adapter's files; None where there is none to be had."""
    try:
        return AdapterFiles.at(path).stamp()
    except (AdapterError, OSError):
        return None


def find_adapter(folder: Path, name: str) -> Path:
    """The adapter of a name in a folder: ``name.safetensors``, or PEFT's folder ``name``.

    Args:
        folder: where adapters lie.
        name: 1 to 64 letters, digits, dots, underscores and hyphens, with no dot in front.

    Raises:
        AdapterError: there is none, it cannot be read, or a part of it is a link that leads out.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter {shown(repr(name))}: names are 1 to 64 of A-Z a-z 0-9 . _ -, "
            f"and do not begin with a dot"
        )
    try:
        return _found(folder, name)
    except AdapterError as error:
        raise AdapterError(f"adapter {name}: {error}") from None
    except OSError as error:
        reason = shown(error.strerror or first_line(error))
        raise AdapterError(f"adapter {name}: it cannot be read: {reason}") from None


def _found(folder: Path, name: str) -> Path:
    file, peft = folder / f"{name}.safetensors", folder / name
    if file.exists() and peft.is_dir():
        raise AdapterError(f"{file.name} and the folder {name} are both there")
    if not file.exists() and not peft.is_dir():
        raise AdapterError(f"there is none in {shown(str(folder))}")
    path = file if file.exists() else peft
    files = AdapterFiles.at(path)
    for part in (files.weights, files.config):
        if part is not None and not part.resolve().is_relative_to(folder.resolve()):
            raise AdapterError(f"{part.name} is a link that leads out of the folder")
    return path


@contextmanager
def open_weights(file: Path, limits: Limits) -> Iterator[Any]:
    """Open a safetensors file: what `safetensors.safe_open` gives.

    Raises:
        AdapterError: it is too large, damaged, or not safetensors at all; also from within.
        OSError: it cannot be read.
    """
    try:
        _check_size(file, limits)
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise AdapterError(f"the file is damaged: {shown(first_line(error))}") from None


def _check_size(file: Path, limits: Limits) -> None:
    size = file.stat().st_size
    if size > limits.file_bytes:
        raise AdapterError(f"the file has {size} bytes, more than {limits.file_bytes}")
    with file.open("rb") as stream:
        start = stream.read(8)
    header = int.from_bytes(start, "little")
    if header > limits.header_bytes:
        if start.startswith((b"PK", b"\x80")):
            raise AdapterError("this is a pickle under another name; only safetensors is read")
        raise AdapterError(f"the file's header has {header} bytes, more than {limits.header_bytes}")
