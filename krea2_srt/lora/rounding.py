"""What is left of merged adapters once the weights are rounded to their stored precision."""

import torch
from torch import Tensor

from krea2_srt.kernels.quantize import quantize_rows, rotate, rotation_block
from krea2_srt.model.quantization import DTYPES, Quantization

_ROWS = 128
"""Rows of each matrix that are looked at, evenly spread."""


class Rounding:
    """Measures, while weights are loaded, how much of an update they keep.

    Weights in bfloat16 lie on a grid, and of a change of less than half a step nothing is left.
    The share is of all that is merged: a small adapter does not show beside a large one.

    Args:
        dtype: of the weights that are not quantised.
        quantization: of the blocks' matrices.
    """

    def __init__(self, dtype: torch.dtype, quantization: Quantization | None = None) -> None:
        self._dtype = dtype
        self._quantization = quantization
        self._kept = 0.0
        self._whole = 0.0

    def note(self, linear: str, stored: Tensor, total: Tensor) -> None:
        """Look at a matrix.

        Args:
            linear: the DiT's name of its `Linear`.
            stored: [out, in] as it is in the checkpoint.
            total: float32 [out, in], with the update.
        """
        rows = torch.linspace(0, len(total) - 1, min(_ROWS, len(total))).long().to(total.device)
        before, after = stored.to(total.device)[rows].float(), total[rows]
        update = after - before
        change = self._rounded(linear, after) - self._rounded(linear, before)
        share = len(total) / len(rows)
        self._kept += share * float((change.double() * update.double()).sum())
        self._whole += share * float(update.double().square().sum())

    @property
    def lost(self) -> float:
        """The share of the update that is not there: 0 is none, 1 all of it."""
        return 1 - self._kept / self._whole if self._whole else 0.0

    def _rounded(self, linear: str, weight: Tensor) -> Tensor:
        part, _, name = linear.partition(".")
        if self._quantization is None or part != "blocks" or self._quantization.keeps(name):
            return weight.to(self._dtype).float()
        dtype = DTYPES[self._quantization.format]
        block = rotation_block(weight.shape[1]) if self._quantization.rotation else 0
        if not block:
            return quantize_rows(weight, dtype).dequantized()
        # Its own inverse.
        return rotate(quantize_rows(rotate(weight, block), dtype).dequantized(), block)
