"""What a conversion loses: relative errors of matrices."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.errors import CheckpointError

_BLOCK = re.compile(r"(?<=blocks\.|layers\.)\d+(?=\.)")
"""The number of a block in a tensor's name."""

_ROWS_AT_ONCE = 2048
"""Rows that are compared at a time, which takes float32 copies of them."""


@dataclass(frozen=True)
class Loss:
    """Errors of all tensors of a kind.

    Attributes:
        kind: the name without what is in each: ``attn.to_q`` of all blocks of the DiT, and
            ``text_fusion.refiner_blocks.*.attn.to_q``.
        mean: of |written - read| / |read| in the 2-norm.
        worst: the largest of them.
        name: of the tensor that has it.
    """

    kind: str
    mean: float
    worst: float
    name: str


class Losses:
    """Collects the errors of tensors, one after another."""

    def __init__(self) -> None:
        self._errors: dict[str, dict[str, float]] = defaultdict(dict)

    def measure(self, name: str, read: Tensor) -> "Measured":
        """Begin with a tensor; its rows follow in `Measured.add`.

        Args:
            name: by which it is told.
            read: as the input has it.
        """
        return Measured(self, name, read)

    def note(self, name: str, error: float) -> None:
        kind = _BLOCK.sub("*", name).removeprefix("transformer_blocks.*.").removesuffix(".weight")
        self._errors[kind][name] = error

    def __iter__(self) -> Iterator[Loss]:
        for kind, errors in self._errors.items():
            worst = max(errors, key=lambda name: errors[name])
            yield Loss(kind, sum(errors.values()) / len(errors), errors[worst], worst)


class Measured:
    """The error of one tensor, some rows at a time."""

    def __init__(self, losses: Losses, name: str, read: Tensor) -> None:
        self._losses = losses
        self._name = name
        self._read = read.reshape(read.shape or (1,))  # a single number is a row
        self._rows = 0
        self._difference = torch.zeros((), dtype=torch.float64)
        self._whole = torch.zeros((), dtype=torch.float64)

    def add(self, written: Tensor) -> None:
        """Compare the next rows.

        Raises:
            CheckpointError: the input has something there that is no number.
        """
        for some in written.reshape(written.shape or (1,)).split(_ROWS_AT_ONCE):
            read = self._read[self._rows : self._rows + len(some)].float()
            self._rows += len(some)
            self._difference += (some.float() - read).square().sum(dtype=torch.float64)
            self._whole += read.square().sum(dtype=torch.float64)
        if not self._whole.isfinite():
            raise CheckpointError(f"{self._name}: non-finite values in it; is the file damaged?")
        if self._rows == len(self._read):
            error = (self._difference / self._whole).sqrt() if self._whole else self._difference
            self._losses.note(self._name, float(error))
