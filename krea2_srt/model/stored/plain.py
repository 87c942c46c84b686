"""Tensors of safetensors files that mean what their numbers are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krea2_srt.errors import CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.stored.extent import Extent


@dataclass(frozen=True)
class PlainTensor:
    """One tensor of a safetensors file, by itself; see `StoredTensor`.

    Attributes:
        file: where it is.
        opened: that file.
    """

    file: Path
    opened: Any
    key: str
    shape: tuple[int, ...]
    kind: str
    extent: Extent

    @property
    def eight_bit(self) -> TokenFormat | None:
        # Without a scale, so every row's is 1.
        return TokenFormat() if self.kind == "F8_E4M3" and len(self.shape) == 2 else None

    def read(self) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(self.key)
        return tensor

    def read_rows(self, rows: slice) -> Tensor:
        """Some of its rows, and no others; it has a dimension at least."""
        tensor: Tensor = self.opened.get_slice(self.key)[rows]
        return tensor

    def read_eight_bit(self) -> QuantizedTokens:
        assert self.eight_bit is not None, f"{self.key} is stored as {self.kind}"
        return QuantizedTokens(self.read(), torch.ones(self.shape[0], 1))

    def wrong(self, what: str) -> CheckpointError:
        """The error for something that is wrong with it."""
        return CheckpointError(f"weight file {self.file}: {self.key} {what}")
