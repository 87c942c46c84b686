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

from krea2_srt.errors import CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.model.stored.chunks import in_float32
from krea2_srt.model.stored.extent import Extent
from krea2_srt.model.stored.formats import adapter_tensor
from krea2_srt.model.stored.gguf_header import read_header, texts_of, value_of

if TYPE_CHECKING:
    from gguf import GGUFReader

_READ = ("Q8_0", "F16", "BF16", "F32")
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
    reader = read_header(file)
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
    return found, texts_of(reader, file)


def _shape(reader: "GGUFReader", tensor: Any, file: Path) -> tuple[int, ...]:
    """As the model sees it: GGUF has the last dimension first, and sometimes another shape."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(_ORIGINAL_SHAPE + tensor.name)
    if field is not None:
        original = value_of(field, file)
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
