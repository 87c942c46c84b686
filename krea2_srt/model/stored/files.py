"""Opening checkpoint files, in whichever format they are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.model.stored.companions import join
from krea2_srt.model.stored.extent import extents
from krea2_srt.model.stored.formats import INSTEAD, adapter_tensor, refused_format
from krea2_srt.model.stored.gguf_file import open_gguf
from krea2_srt.model.stored.gguf_header import MAGIC as GGUF
from krea2_srt.model.stored.plain import PlainTensor
from krea2_srt.model.stored.tensor import StoredTensor

MAX_TENSORS = 2**16
"""Tensors in a file; Krea 2's have some hundreds."""

_OTHER_FILES = {
    b"PK\x03\x04": "a PyTorch pickle, which can run code",
    b"\x80": "a PyTorch pickle, which can run code",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull)",
    b"<": "a web page",
}
"""What files are that begin with some bytes."""


@dataclass(frozen=True)
class StoredFiles:
    """All tensors of a part of a checkpoint.

    Attributes:
        tensors: in the order in which they lie in the files, by their names there.
        metadata: what the files say of themselves.
        notes: what a user should know of how they are read, for the log.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


@contextmanager
def open_files(files: Sequence[Path]) -> Iterator[StoredFiles]:
    """Open the files of one part.

    Only their headers, scales and markers are read; a tensor is when it is asked for.

    Raises:
        CheckpointError: a file is missing, damaged or in a format that is not read, or two have
            a tensor of the same name.
    """
    plain: dict[str, PlainTensor] = {}
    tensors: dict[str, StoredTensor] = {}
    said: dict[Path, Mapping[str, str]] = {}
    with ExitStack() as stack:
        for file in files:
            found: dict[str, PlainTensor] = {}
            if _begins_with(file) == GGUF:
                others, said[file] = open_gguf(file)
                tensors |= _once(others, file, tensors, plain)
            else:
                found, said[file] = _open_safetensors(file, stack)
                plain |= _once(found, file, tensors, plain)
        joined = join(plain, said)
        metadata = {key: value for some in said.values() for key, value in some.items()}
        yield StoredFiles({**tensors, **joined.tensors}, metadata, joined.notes)


def _begins_with(file: Path) -> bytes:
    """The first bytes of a file, as many as formats are told by.

    Raises:
        CheckpointError: it cannot be read, or is of another kind.
    """
    try:
        if file.exists() and not file.is_file():  # opening a pipe waits for who writes to it
            raise CheckpointError(f"weight file {file} is no regular file")
        with file.open("rb") as opened:
            first = opened.read(max(map(len, _OTHER_FILES)))
    except OSError as error:
        raise CheckpointError(f"weight file {file} cannot be read: {error.strerror}") from None
    # A safetensors file begins with its header's length, eight bytes, and a brace.
    if first[8:9] != b"{":
        for start, what in _OTHER_FILES.items():
            if first.startswith(start):
                raise CheckpointError(f"weight file {file} is {what}; {INSTEAD}")
    return first[: len(GGUF)]


def _open_safetensors(
    file: Path, stack: ExitStack
) -> tuple[dict[str, PlainTensor], Mapping[str, str]]:
    try:
        opened = stack.enter_context(safe_open(file, framework="pt"))
        keys = opened.offset_keys()
        parts = {key: opened.get_slice(key) for key in keys[:MAX_TENSORS]}
        places = extents(file)
        found = {
            key: PlainTensor(
                file, opened, key, tuple(part.get_shape()), part.get_dtype(), places[key]
            )
            for key, part in parts.items()
        }
        metadata: Mapping[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weight file {file} is damaged: {first_line(error)}") from None
    except (ValueError, LookupError):  # of `extents`, which opens it once more
        raise CheckpointError(f"weight file {file} was replaced while it was opened") from None
    _check_names(keys, file)
    return found, metadata


def _check_names(keys: Sequence[str], file: Path) -> None:
    """Refuse what is in a format that is told by the names of its tensors."""
    if len(keys) > MAX_TENSORS:
        raise CheckpointError(f"weight file {file} has {len(keys)} tensors")
    for key in keys:
        if not key.isprintable():
            raise CheckpointError(f"weight file {file}: {key!r} is no name of a tensor")
    if (refused := refused_format(keys)) is not None:
        key, format = refused
        raise CheckpointError(f"weight file {file} is {format}, as {key} tells; {INSTEAD}")
    if (mark := adapter_tensor(keys)) is not None:
        raise CheckpointError(
            f"weight file {file} is an adapter, as {mark} tells, and no model; adapters are given "
            "beside a model (docs/lora.md)"
        )


def _once(
    found: Mapping[str, StoredTensor], file: Path, *before: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor]:
    for key in found:
        if any(key in some for some in before):
            raise CheckpointError(f"weight file {file}: {key} is there twice")
    return found
