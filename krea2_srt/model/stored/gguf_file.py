"""GGUF files, through the gguf package."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from krea2_srt.errors import CheckpointError, first_line, how_to_install
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.model.stored.chunks import in_float32
from krea2_srt.model.stored.extent import Extent
from krea2_srt.model.stored.formats import adapter_tensor

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"

_READ = ("Q8_0", "F16", "BF16", "F32")
_MAX_VALUES = 2_000_000
"""Values of a header. Those of a file with a tokenizer of 150,000 words are half as many."""
_MAX_TEXT = 2**24
"""Bytes of a name or text in a header."""
_MAX_DIMENSIONS = 8
_LLAMA_CPP = ("blk.", "v.blk.", "token_embd.")
"""How llama.cpp's names of tensors begin."""
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a GGUF file; see `StoredTensor`.

    Attributes:
        data: its bytes or numbers as they are stored, mapped from the file, row by row.
    """

    key: str
    shape: tuple[int, ...]
    kind: str
    data: Any
    extent: Extent
    eight_bit: None = None

    def read(self) -> Tensor:
        if self.kind == "Q8_0":
            rows = len(self._matrix)
            shape = (rows, math.prod(self.shape) // rows)
            return in_float32(shape, self._rows).view(self.shape)
        numbers = torch.from_numpy(np.array(self.data))
        if self.kind == "BF16":  # which numpy lacks: bytes
            numbers = numbers.view(torch.bfloat16)
        return numbers.view(self.shape)

    @property
    def _matrix(self) -> Any:
        """Its bytes, row by row, whatever its dimensions are: [rows, bytes]."""
        return self.data.reshape(-1, self.data.shape[-1])

    def _rows(self, rows: slice) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        # Scales that are not finite show in the first picture, as those of other weights do.
        with np.errstate(invalid="ignore", over="ignore"):
            numbers = dequantize(np.array(self._matrix[rows]), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(numbers)

    def read_eight_bit(self) -> QuantizedTokens:
        raise TypeError(f"{self.key} is stored as {self.kind}")


def open_gguf(file: Path) -> tuple[dict[str, GgufTensor], Mapping[str, str]]:
    """The tensors of a file, by name, and what it says of itself; its header is read.

    Raises:
        CheckpointError: it is damaged, in a format that is not read, or of another naming, or the
            gguf package is not installed.
    """
    reader = _reader(file)
    names = [tensor.name for tensor in reader.tensors]
    for name in names:
        if not name.isprintable():
            raise CheckpointError(f"weight file {file}: {name!r} is no name of a tensor")
        if name.startswith(_LLAMA_CPP):
            raise CheckpointError(
                f"weight file {file} has llama.cpp's names ({name}), which are not read; use "
                "safetensors, as qwen3vl_4b_bf16 or qwen3vl_4b_fp8_scaled"
            )
    if (key := adapter_tensor(names)) is not None:
        raise CheckpointError(
            f"weight file {file} is an adapter, as {key} tells, and no model; adapters are given "
            "beside a model (docs/lora.md)"
        )
    found = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in _READ:
            raise CheckpointError(
                f"weight file {file}: {tensor.name} is stored as {kind}; of GGUF's types "
                f"{', '.join(_READ)} are read; use Q8_0, fp8_scaled or bf16"
            )
        shape = _shape(reader, tensor, file)
        extent = Extent(file, int(tensor.data_offset + tensor.n_bytes))
        found[tensor.name] = GgufTensor(tensor.name, shape, kind, tensor.data, extent)
    return found, _texts(reader, file)


def _shape(reader: "GGUFReader", tensor: Any, file: Path) -> tuple[int, ...]:
    """As the model sees it: GGUF has the last dimension first, and sometimes another shape."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(_ORIGINAL_SHAPE + tensor.name)
    if field is not None:
        original = _value(field, file)
        if not isinstance(original, list) or not all(type(size) is int for size in original):
            raise CheckpointError(
                f"weight file {file}: {field.name!r} is {shortened(original)}, no shape"
            )
        if any(size < 1 for size in original) or math.prod(original) != math.prod(shape):
            raise CheckpointError(
                f"weight file {file}: {field.name!r} is {shortened(original)}, the tensor has "
                f"{list(shape)}"
            )
        shape = tuple(original)
    if not all(shape):
        raise CheckpointError(
            f"weight file {file}: {tensor.name} has shape {list(shape)}, so there is nothing in it"
        )
    return shape


def _value(field: Any, file: Path) -> Any:
    try:
        return field.contents()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"weight file {file} is damaged: {field.name!r} in its header is no text"
        ) from None


def _texts(reader: "GGUFReader", file: Path) -> dict[str, str]:
    """The header's fields of one value."""
    from gguf import GGUFValueType

    return {
        name: str(_value(field, file))
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }


def _reader(file: Path) -> "GGUFReader":
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
