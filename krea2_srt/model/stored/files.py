"""Opening checkpoint files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from krea2_srt.errors import CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.stored.extent import Extent, extents
from krea2_srt.model.stored.tensor import StoredTensor

PLAIN = ("BF16", "F16", "F32")
"""Stored as numbers that mean themselves."""


@dataclass(frozen=True)
class StoredFiles:
    """All tensors of a part of a checkpoint.

    Attributes:
        tensors: in the order in which they lie in the files, by their names there.
        metadata: what the files say of themselves.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


@contextmanager
def open_files(files: Sequence[Path]) -> Iterator[StoredFiles]:
    """Open the files of one part; only their headers are read until a tensor is.

    Raises:
        CheckpointError: a file is missing, damaged or in a format that is not read, or two have
            a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                places = extents(file)
                found = [
                    PlainTensor(opened, key, tuple(part.get_shape()), part.get_dtype(), places[key])
                    for key, part in ((k, opened.get_slice(k)) for k in opened.offset_keys())
                ]
                metadata |= opened.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"weight file {file} is damaged: {error}") from None
            for tensor in found:
                if tensor.kind not in PLAIN:
                    raise CheckpointError(
                        f"weight file {file}: {tensor.key} is {tensor.kind}; "
                        f"weights must be one of {', '.join(PLAIN)}"
                    )
                if tensor.key in tensors:
                    raise CheckpointError(f"weight file {file}: {tensor.key} is there twice")
                tensors[tensor.key] = tensor
        yield StoredFiles(tensors, metadata)


@dataclass(frozen=True)
class PlainTensor:
    """One of a safetensors file, stored as floating-point numbers; see `StoredTensor`."""

    opened: Any
    key: str
    shape: tuple[int, ...]
    kind: str
    extent: Extent
    eight_bit: TokenFormat | None = None

    def read(self) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(self.key)
        return tensor

    def read_eight_bit(self) -> QuantizedTokens:
        raise TypeError(f"{self.key} is stored as {self.kind}")
