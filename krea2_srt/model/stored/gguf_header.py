"""Headers of GGUF files, through the gguf package. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from krea2_srt.errors import CheckpointError, first_line, how_to_install

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"

_MAX_VALUES = 2_000_000
"""Values of a header. Those of a file with a tokenizer of 150,000 words are half as many."""
_MAX_TEXT = 2**24
"""Bytes of a name or text in a header."""
_MAX_DIMENSIONS = 8


def gguf_metadata(file: Path) -> Mapping[str, str]:
    """What a file says of itself: the fields of its header that have one value.

    Raises:
        CheckpointError: see `read_header`.
    """
    return texts_of(read_header(file), file)


def value_of(field: Any, file: Path) -> Any:
    try:
        return field.contents()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"weight file {file} is damaged: {field.name!r} in its header is no text"
        ) from None


def texts_of(reader: "GGUFReader", file: Path) -> dict[str, str]:
    """The header's fields of one value."""
    from gguf import GGUFValueType

    return {
        name: str(value_of(field, file))
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }


def read_header(file: Path) -> "GGUFReader":
    """gguf's, which believes whatever a header says, with bounds."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(
            f"weight file {file}: the gguf package is not installed; {how_to_install()}"
        ) from None

    class Bounded(GGUFReader):
        values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.values += 1
            if self.values > _MAX_VALUES:
                raise ValueError("its header has too many values")
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before its header says")
            return super()._get(offset, dtype, count, override_order)

        def _get_str(self, offset: int) -> Any:
            if self._get(offset, np.uint64)[0] > _MAX_TEXT:
                raise ValueError("a text in its header is too long")
            return super()._get_str(offset)

        def _get_tensor_info_field(self, orig_offs: int) -> Any:
            (length,) = self._get(orig_offs, np.uint64)
            dimensions = self._get(orig_offs + 8 + int(length), np.uint32)[0]
            if not 0 < dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            return super()._get_tensor_info_field(orig_offs)

    try:
        with np.errstate(over="raise"):  # an offset that wraps
            reader = Bounded(file)
    except Exception as error:  # whatever gguf makes of a strange file
        raise CheckpointError(f"weight file {file} is damaged: {first_line(error)}") from None
    if reader.byte_order == "S":
        raise CheckpointError(f"weight file {file} is big-endian, which is not read")
    return reader
