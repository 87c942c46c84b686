"""What is left of merged adapters once the weights are rounded to their stored precision."""

import torch
from torch import Tensor

from krea2_srt.kernels.quantize import TokenFormat, quantize_tokens
from krea2_srt.model.quantization import meaning

_ROWS = 128
"""Rows of each matrix that are looked at, evenly spread."""


class Rounding:
    """Measures, while weights are loaded, how much of an update they keep.

    Weights in bfloat16 lie on a grid, and of a change of less than half a step nothing is left.
    The share is of all that is merged: a small adapter does not show beside a large one.

    Args:
        dtype: of the weights that are not quantised.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept = 0.0
        self._whole = 0.0

    def note(self, stored: Tensor, total: Tensor, format: TokenFormat | None) -> None:
        """Look at a matrix.

        Args:
            stored: [out, in] as it is in the checkpoint.
            total: float32 [out, in], with the update.
            format: what the rows are quantised to; None for those that are not.
        """
        rows = torch.linspace(0, len(total) - 1, min(_ROWS, len(total))).long().to(total.device)
        before, after = stored.to(total.device)[rows].float(), total[rows]
        update = after - before
        change = self._rounded(after, format) - self._rounded(before, format)
        share = len(total) / len(rows)
        self._kept += share * float((change.double() * update.double()).sum())
        self._whole += share * float(update.double().square().sum())

    @property
    def lost(self) -> float:
        """The share of the update that is not there: 0 is none, 1 all of it."""
        return 1 - self._kept / self._whole if self._whole else 0.0

    def _rounded(self, weight: Tensor, format: TokenFormat | None) -> Tensor:
        if format is None:
            return weight.to(self._dtype).float()
        return meaning(quantize_tokens(weight, format), format)
