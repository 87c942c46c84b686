"""Matrix multiplications of the blocks in 8 bits.

Weights have a scale per output channel and are quantised once, when they are loaded. Tokens have
a scale each and are quantised by the kernel that makes them, see `krea2_srt.kernels.quantize`.
Everything outside the blocks' matrices stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.int8_cpu import int8_product_cpu
from krea2_srt.kernels.products import ScaledProduct, scaled_product, scaled_product_torch
from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    Tokens,
    quantize_rows,
    rotate,
    rotation_block,
)
from krea2_srt.model.layers import Linear, LinearFactory, parameter, plain_linears
from krea2_srt.model.weights import WeightSlot

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

MATRICES = ("attn.qkvg", "attn.out", "ff.gate_up", "ff.down")
"""Matrices of a block. A name is the block's number and one of these, as in ``27.ff.down``."""

_ROWS_AT_ONCE = 2048
"""Rows of a weight that are quantised at a time, which takes float32 copies of them."""


@dataclass(frozen=True)
class Quantization:
    """Which matrices are quantised, and how.

    Attributes:
        format: ``fp8`` (e4m3) or ``int8``.
        rotation: rotate the inputs by a Hadamard matrix first, which spreads outliers. int8 needs
            it, its steps are all of one size; e4m3 has its own exponent, and gains nothing.
        keep: names of matrices that stay in the compute dtype; ``*`` and ``?`` match any text and
            any character.
    """

    format: str = "fp8"
    rotation: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            known = ", ".join(DTYPES)
            raise ConfigError(f"quantization: must be one of {known}, got {self.format!r}")

    @property
    def name(self) -> str:
        """What tells variants apart where they are compared: the format alone is as `SERVED`."""
        if self.rotation is SERVED[self.format].rotation:
            return self.format
        return f"{self.format}_{'rotated' if self.rotation else 'unrotated'}"

    def check(self, num_blocks: int) -> None:
        """Check that every name to be kept is one of a model's.

        Raises:
            ConfigError: one is not.
        """
        names = [f"{i}.{matrix}" for i in range(num_blocks) for matrix in MATRICES]
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"quantization: no matrix is called {pattern!r}; names are {names[0]} to "
                    f"{names[-1]}, with one of {', '.join(MATRICES)}"
                )

    def keeps(self, name: str) -> bool:
        """Whether a matrix stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)


SERVED = {"int8": Quantization("int8", rotation=True), "fp8": Quantization("fp8")}
"""What can be asked for, by name. What one of them leaves in the compute dtype unless it is told
otherwise is its `Quantization.keep`.
"""

SGLANG_NAMES = {"convrot_int8": "int8"}
"""SGLang's names of those that it calls something else."""


def served(name: str) -> Quantization:
    """What a name asks for.

    Raises:
        ConfigError: it is none of `SERVED`.
    """
    if name not in SERVED:
        raise ConfigError(f"quantization: must be one of {', '.join(SERVED)}, got {name!r}")
    return SERVED[name]


def our_name(name: str) -> str:
    """Ours of what SGLang's ``--quantization`` was given."""
    return SGLANG_NAMES.get(name, name)


def sglang_quantization(name: str, keep: Sequence[str]) -> Quantization:
    """What SGLang's ``--quantization`` and ``--quantization-ignored-layers`` ask for.

    Raises:
        ConfigError: the first is none of `SERVED`, by either name.
    """
    asked = served(our_name(name))
    return replace(asked, keep=tuple(keep)) if keep else asked


class QuantizedLinear(Linear):
    """`Linear` in 8 bits, without a bias.

    Args:
        in_features, parts: see `Linear`.
        dtype: of what it returns.
        format: of its input, and of the weights.

    Attributes:
        product: multiplies on CUDA.
    """

    format: TokenFormat
    scale: Tensor

    def __init__(
        self, in_features: int, parts: dict[str, int], dtype: torch.dtype, format: TokenFormat
    ) -> None:
        nn.Module.__init__(self)
        self.parts = parts
        self.format = format
        self.dtype = dtype
        rows = sum(parts.values())
        self.weight = parameter(rows, in_features, dtype=format.dtype)
        self.scale = parameter(rows, 1, dtype=torch.float32)
        self.bias = None
        self.product: ScaledProduct = scaled_product_torch

    def product_with(self, x: Tokens) -> Tensor:
        """Tokens [T, in_features] in its format -> [T, rows]."""
        assert isinstance(x, QuantizedTokens)
        if x.values.is_cuda:
            return self.product(x, self.weight, self.scale, self.dtype)
        if self.format.dtype is torch.int8:
            return int8_product_cpu(x, self.weight, self.scale, self.dtype)
        return scaled_product(x, self.weight, self.scale, self.dtype)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        start = 0
        for name, rows in self.parts.items():
            slot = WeightSlot(
                self.weight[start : start + rows],
                store=partial(self._store, start),
                eight_bit=self.format,
                take=partial(self._take, start),
                rows_of=self.weight,
                start=start,
            )
            yield f"{prefix}{name}.weight", slot
            start += rows

    def _take(self, start: int, rows: QuantizedTokens) -> None:
        """Put rows that are quantised already in their place from ``start`` on."""
        place = slice(start, start + len(rows))
        self.weight[place] = rows.values.to(self.weight.device)
        self.scale[place] = rows.scale.to(self.scale.device)

    def _store(self, start: int, stored: Tensor) -> None:
        """Quantise a stored matrix into the rows from ``start`` on: on a device that it is on
        already, or else where the rows are.
        """
        device = self.weight.device if stored.device.type == "cpu" else stored.device
        for quantized in quantized_rows(stored, self.format, device):
            rows = slice(start, start + len(quantized))
            self.weight[rows] = quantized.values
            self.scale[rows] = quantized.scale
            start += len(quantized)


def quantized_rows(
    stored: Tensor, format: TokenFormat, device: torch.device
) -> Iterator[QuantizedTokens]:
    """A stored matrix in 8 bits, some rows at a time: float32 copies of them are all it takes.

    Args:
        stored: [out, in].
        format: how.
        device: where it is computed, and where the rows are.
    """
    for some in stored.split(_ROWS_AT_ONCE):
        weight = some.to(device).float()
        if format.rotation:
            weight = rotate(weight, format.rotation)
        yield quantize_rows(weight, format.dtype)


def meaning(rows: QuantizedTokens, format: TokenFormat) -> Tensor:
    """What rows of a weight stand for: float32 [rows, in], not rotated."""
    numbers = rows.dequantized()
    # The rotation is its own inverse.
    return rotate(numbers, format.rotation) if format.rotation else numbers


def block_linears(
    quantization: Quantization | None,
    block: int,
    dtype: torch.dtype,
    rotations: Mapping[str, int] = MappingProxyType({}),
) -> LinearFactory:
    """What makes the matrices of a block.

    Args:
        quantization: of the matrices; None leaves them in the compute dtype.
        block: its number.
        dtype: the compute dtype.
        rotations: block sizes of matrices that a checkpoint has in int8 already, 0 for none, by
            names such as ``blocks.0.attn.qkvg``. Where int8 with a rotation is asked for, these
            matrices have the checkpoint's, so that its numbers are taken as they are.
    """
    plain = plain_linears(dtype)
    if quantization is None:
        return plain

    def make(name: str, in_features: int, parts: dict[str, int]) -> Linear:
        if quantization.keeps(f"{block}.{name}"):
            return plain(name, in_features, parts)
        rotation = rotation_block(in_features) if quantization.rotation else 0
        stored = rotations.get(f"blocks.{block}.{name}")
        if quantization.rotation and quantization.format == "int8" and stored is not None:
            rotation = stored
        elif quantization.rotation and not rotation:
            raise ConfigError(f"quantization: inputs of {in_features} cannot be rotated")
        format = TokenFormat(DTYPES[quantization.format], rotation)
        return QuantizedLinear(in_features, parts, dtype, format)

    return make
