"""Matrices in 8 bits beside which their scales are stored: fp8_scaled, int8 and int8_convrot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat, rotate
from krea2_srt.model.stored.chunks import in_float32
from krea2_srt.model.stored.extent import Extent
from krea2_srt.model.stored.plain import PlainTensor

_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
"""What products can be made of."""


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A weight whose numbers are ``values * scale``, rotated or not; see `StoredTensor`.

    Attributes:
        values: as they are stored.
        scale: float32 [1] or [out].
        rotation: how many columns are rotated together; 0 for no rotation.
    """

    values: PlainTensor
    scale: Tensor
    rotation: int = 0

    @property
    def key(self) -> str:
        return self.values.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def extent(self) -> Extent:
        return self.values.extent

    @property
    def kind(self) -> str:
        if self.values.kind == "I8":
            return "int8_convrot" if self.rotation else "int8"
        return "fp8_scaled" if self.values.kind == "F8_E4M3" else "fp8_scaled in e5m2"

    @property
    def eight_bit(self) -> TokenFormat | None:
        dtype = _DTYPES.get(self.values.kind)
        if dtype is None or len(self.shape) != 2:
            return None
        return TokenFormat(dtype, self.rotation)

    def read(self) -> Tensor:
        return in_float32(self.shape, self._rows)

    def _rows(self, rows: slice) -> Tensor:
        values = self.values.read_rows(rows).float().flatten(1)
        values *= (self.scale[rows] if len(self.scale) > 1 else self.scale)[:, None]
        # The rotation is its own inverse.
        return rotate(values, self.rotation) if self.rotation else values

    def read_eight_bit(self) -> QuantizedTokens:
        assert self.eight_bit is not None, f"{self.key} is stored as {self.kind}"
        scale = self.scale.expand(self.shape[0])[:, None]
        return QuantizedTokens(self.values.read(), scale.contiguous())
