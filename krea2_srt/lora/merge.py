"""Adapters merged into the model's weights while these are loaded.

    load_dit(path, device, dtype, quantization, merge([(adapter, 1.0)], config))

It is added to the stored weights in float32, before they are cast or quantised: added to weights
that lie on the coarse grid of 8 bits already, most of it would be rounded away.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.errors import AdapterError
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.lora.adapter import Adapter
from krea2_srt.lora.rounding import Rounding
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.matrices import Matrix, dit_matrices
from krea2_srt.model.weights import WeightDelta


@dataclass(frozen=True, eq=False)
class _Product:
    """``weight * up @ down``, added to some of a matrix's rows."""

    down: Tensor
    up: Tensor
    start: int
    weight: float


@dataclass(frozen=True, eq=False)
class _Sum:
    """All that is added to one matrix of a checkpoint."""

    name: str
    matrix: Matrix
    products: tuple[_Product, ...]
    rounding: Rounding | None

    def added_to(self, stored: Tensor, format: TokenFormat | None) -> Tensor:
        if tuple(stored.shape) != self.matrix.shape:
            raise AdapterError(
                f"{self.name} has shape {list(stored.shape)}, the merged adapter is for one of "
                f"shape {list(self.matrix.shape)}"
            )
        total = stored.to(torch.float32, copy=True)
        for product in self.products:
            down, up = product.down.to(total.device), product.up.to(total.device)
            rows = total[product.start : product.start + len(up)]
            rows.addmm_(up, down, alpha=product.weight)
        if self.rounding is not None:
            self.rounding.note(stored, total, format)
        return total


def merge(
    adapters: Iterable[tuple[Adapter, float]],
    config: Krea2Config,
    rounding: Rounding | None = None,
) -> dict[str, WeightDelta]:
    """What some adapters add to a checkpoint's matrices.

    Args:
        adapters: each with its weight; at 0 nothing is added, and the model is the base model to
            the bit.
        config: the model's.
        rounding: is told of every matrix, as it is loaded.

    Returns:
        By Diffusers name of a tensor, for `krea2_srt.model.dit_files.load_dit`.

    Raises:
        AdapterError: a weight is not finite, or an adapter is another model's.
    """
    matrices = dit_matrices(config)
    found: dict[str, list[_Product]] = {}
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise AdapterError(f"adapter {adapter.name}: its weight must be finite, got {weight}")
        _check_fits(adapter, matrices.values())
        if weight == 0:
            continue
        for name, matrix in matrices.items():
            products = _products(adapter, weight, matrix)
            if products:
                found.setdefault(name, []).extend(products)
    return {
        f"{name}.weight": _Sum(name, matrices[name], tuple(products), rounding)
        for name, products in found.items()
    }


def _check_fits(adapter: Adapter, matrices: Iterable[Matrix]) -> None:
    widths: dict[str, int] = {}
    rows: dict[str, int] = {}
    for matrix in matrices:
        widths[matrix.linear] = matrix.shape[1]
        rows[matrix.linear] = max(matrix.stop, rows.get(matrix.linear, 0))
    for linear, factors in adapter.matrices.items():
        for factor in factors:
            width = factor.down.shape[1]
            if widths.get(linear) != width or factor.stop > rows[linear]:
                raise AdapterError(f"adapter {adapter.name}: its {linear} is not this model's")


def _products(adapter: Adapter, weight: float, matrix: Matrix) -> list[_Product]:
    """The parts of an adapter's factors that lie in the rows of a matrix."""
    found = []
    for factor in adapter.matrices.get(matrix.linear, ()):
        start, stop = max(factor.start, matrix.start), min(factor.stop, matrix.stop)
        if start < stop:
            up = factor.up[start - factor.start : stop - factor.start]
            found.append(_Product(factor.down, up, start - matrix.start, weight))
    return found
