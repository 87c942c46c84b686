"""What becomes of each stored tensor."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.convert.losses import Losses
from krea2_srt.convert.tensor_file import DTYPES, TensorHeader
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.dit_files import StoredDiT, original_name, original_shape
from krea2_srt.model.quantization import Quantization, meaning, quantized_rows
from krea2_srt.model.stored.formats import PLAIN
from krea2_srt.model.stored.markers import marker_of
from krea2_srt.model.stored.tensor import StoredTensor

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Names:
    """How a layout calls tensors, and which shapes it gives them.

    Attributes:
        name: of a Diffusers name.
        shape: of a Diffusers name and shape.
    """

    name: Callable[[str], str]
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]


DIFFUSERS = Names(lambda name: name, lambda name, shape: shape)
ORIGINAL = Names(original_name, original_shape)


@dataclass(frozen=True)
class Conversion:
    """One stored tensor, and what is written for it.

    Attributes:
        name: in Diffusers' words, for messages.
        source: where it comes from.
        headers: what is written: the tensor, or rows in 8 bits, their scales and a marker.
        format: what a matrix is quantised to; None where it stays a tensor of numbers.
    """

    name: str
    source: StoredTensor
    headers: tuple[TensorHeader, ...]
    format: TokenFormat | None

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers)

    @property
    def how(self) -> str:
        """In a word or two, for the report."""
        if self.format is None:
            return "kept" if self.source.kind in PLAIN else "dequantised to bfloat16"
        return "taken as they are" if self.source.eight_bit == self.format else "quantised"

    def tensors(self, losses: Losses) -> Iterator[Tensor]:
        """What is written, in the order of the headers.

        Raises:
            CheckpointError: it cannot be read, or has something in it that is no number.
        """
        if self.format is None:
            yield self._numbers(losses)
            return
        rows = self._rows(self.format, losses)
        yield rows.values
        yield rows.scale
        yield _marker_tensor(self.format)

    def _numbers(self, losses: Losses) -> Tensor:
        (header,) = self.headers
        read = self.source.read()
        written = read.to(header.dtype)
        if self.source.kind not in PLAIN:
            losses.measure(self.name, read).add(written)
        return written.reshape(header.shape)

    def _rows(self, format: TokenFormat, losses: Losses) -> QuantizedTokens:
        # The same choice as that of `krea2_srt.model.weights.load_weights`, so that what is
        # served is the same whether it is quantised here or there.
        if self.source.eight_bit == format:
            return self.source.read_eight_bit()
        read = self.source.read()
        measured = losses.measure(self.name, read)
        found = []
        for rows in quantized_rows(read, format, _HOST):
            measured.add(meaning(rows, format))
            found.append(rows)
        return QuantizedTokens(
            torch.cat([rows.values for rows in found]), torch.cat([rows.scale for rows in found])
        )


def conversion(
    name: str,
    source: StoredTensor,
    format: TokenFormat | None = None,
    names: Names = DIFFUSERS,
) -> Conversion:
    """What is written for one tensor.

    Args:
        name: Diffusers'.
        source: where it comes from.
        format: what a matrix is quantised to.
        names: the layout's.
    """
    return Conversion(name, source, _headers(name, source, format, names), format)


def conversions(
    stored: StoredDiT, quantization: Quantization | None, names: Names
) -> list[Conversion]:
    """What is written for each tensor of a DiT, in the order in which they are stored."""
    formats = stored.eight_bit_formats(quantization) if quantization is not None else {}
    return [
        conversion(name, source, formats.get(name), names)
        for name, source in stored.tensors.items()
    ]


def _headers(
    name: str, source: StoredTensor, format: TokenFormat | None, names: Names
) -> tuple[TensorHeader, ...]:
    written = names.name(name)
    if format is None:
        # Numbers stay as exact as they are; bfloat16 is what others would have in place of 8 bits.
        dtype = DTYPES[source.kind] if source.kind in PLAIN else torch.bfloat16
        return (TensorHeader(written, dtype, names.shape(name, source.shape)),)
    stem = written.removesuffix(".weight")
    return (
        TensorHeader(written, format.dtype, source.shape),
        TensorHeader(f"{stem}.weight_scale", torch.float32, (source.shape[0], 1)),
        TensorHeader(f"{stem}.comfy_quant", torch.uint8, tuple(_marker_tensor(format).shape)),
    )


def _marker_tensor(format: TokenFormat) -> Tensor:
    """By which ComfyUI and others know a matrix's format, ``<stem>.comfy_quant``."""
    return torch.tensor(list(json.dumps(marker_of(format)).encode()), dtype=torch.uint8)
