"""Where an adapter's files lie, and what is known of them before a tensor is read."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from krea2_srt.errors import AdapterError, first_line
from krea2_srt.lora.keys import shown
from krea2_srt.lora.limits import Limits
from krea2_srt.request import ADAPTER_NAMES, is_adapter_name

SUFFIX = ".safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"


class UnreadableError(AdapterError):
    """It could not be read this time."""


class NoAdapterError(AdapterError):
    """There is none of this name."""


Stamp = tuple[tuple[int, int, int], ...]
"""What differs once one of some files is replaced or written to: inode, bytes and time of each."""


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
        if path.suffix != SUFFIX:
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
        folder: where adapters lie, or folders of them.
        name: see `krea2_srt.request.is_adapter_name`.

    Raises:
        NoAdapterError: there is none.
        AdapterError: it cannot be read, or a part of it is a link that leads out.
    """
    if not is_adapter_name(name):
        raise NoAdapterError(f"adapter {shown(repr(name))}: names are {ADAPTER_NAMES}")
    try:
        return _found(folder, name)
    except AdapterError as error:
        raise type(error)(f"adapter {name}: {error}") from None
    except OSError as error:
        raise UnreadableError(f"adapter {name}: {unreadable(error)}") from None


def adapter_names(folder: Path) -> list[str]:
    """The names of all that look like adapters in a folder, and in the folders in it, in order.

    What is called as no adapter can be is not among them.

    Raises:
        OSError: the folder cannot be read.
    """
    names: set[str] = set()
    for path in folder.iterdir():
        if (name := _name_of(path)) is not None:
            names.add(name)
        elif path.is_dir() and is_adapter_name(path.name):
            with suppress(OSError):
                inner = (_name_of(file) for file in path.iterdir())
                names |= {f"{path.name}/{name}" for name in inner if name is not None}
    return sorted(filter(is_adapter_name, names))


def _name_of(path: Path) -> str | None:
    """What an adapter would be called; None of what is none."""
    if path.suffix == SUFFIX:
        return path.stem
    return path.name if (path / _PEFT_WEIGHTS).is_file() else None


def unreadable(error: OSError) -> str:
    """Why a file is not read, without its path."""
    return f"it cannot be read: {shown(error.strerror or first_line(error))}"


def _found(folder: Path, name: str) -> Path:
    file, peft = folder / f"{name}{SUFFIX}", folder / name
    if file.exists() and (peft / _PEFT_WEIGHTS).exists():
        raise AdapterError(f"{file.name} and the folder {peft.name} are both there")
    if not file.exists() and not peft.is_dir():
        raise NoAdapterError("there is none")
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
