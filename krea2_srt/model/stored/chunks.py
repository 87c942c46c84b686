"""Stored matrices as float32, with few of their rows in memory twice."""

from collections.abc import Callable

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 2**24
"""Elements of a tensor that are made float32 at a time."""


def in_float32(shape: tuple[int, ...], rows: Callable[[slice], Tensor]) -> Tensor:
    """float32 of some shape, made of some rows at a time.

    Args:
        shape: of at least one dimension.
        rows: gives the rows of a slice, in any shape of as many elements.
    """
    found = torch.empty(shape, dtype=torch.float32)
    at_once = max(1, _ELEMENTS_AT_ONCE * shape[0] // max(1, found.numel()))
    for start in range(0, shape[0], at_once):
        some = slice(start, min(start + at_once, shape[0]))
        found[some] = rows(some).view(found[some].shape)
    return found
