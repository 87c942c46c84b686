"""LoKr as a plain pair of factors, exactly.

LoKr adds ``kron(w1, w2)``, where either can be a product of two. Since

    kron(a @ b, c @ d)  =  kron(a, c) @ kron(b, d),

it is a LoRA of rank rank(w1) * rank(w2). A matrix in one piece is a product with an identity, on
its smaller side, so its rank is that side's.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from krea2_srt.errors import AdapterError
from krea2_srt.lora.stored import Shape

_PARTS = ("lokr_w1", "lokr_w2")


def lokr_shape(shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    """Out, in and rank of a LoKr.

    Args:
        shapes: of its tensors by role, as in ``lokr_w2_a``.

    Raises:
        AdapterError: a part is missing, there twice, or its shapes do not fit one another.
    """
    rows, columns, ranks = zip(*(_part_shape(shapes, part) for part in _PARTS), strict=True)
    return rows[0] * rows[1], columns[0] * columns[1], ranks[0] * ranks[1]


def lokr_dim(shapes: Mapping[str, Shape]) -> int | None:
    """What alpha is divided by; None if alpha has no effect, since nothing is a product."""
    for part in reversed(_PARTS):
        if f"{part}_b" in shapes:
            return shapes[f"{part}_b"][0]
    return None


def lokr_factors(
    tensor: Callable[[str], Tensor], shapes: Mapping[str, Shape]
) -> tuple[Tensor, Tensor]:
    """Down [rank, in] and up [out, rank], without a scale.

    Args:
        tensor: reads one by its role, float32.
        shapes: see `lokr_shape`, which must have been called.
    """
    ups, downs = zip(*(_part(tensor, shapes, part) for part in _PARTS), strict=True)
    return torch.kron(*downs), torch.kron(*ups)


def _part_shape(shapes: Mapping[str, Shape], part: str) -> tuple[int, int, int]:
    whole, a, b = (shapes.get(f"{part}{end}") for end in ("", "_a", "_b"))
    for shape in (whole, a, b):
        if shape is not None and (len(shape) != 2 or 0 in shape):
            raise AdapterError(f"{part} has shape {list(shape)}, expected two dimensions")
    if whole is not None and a is None and b is None:
        return whole[0], whole[1], min(whole)
    if whole is None and a is not None and b is not None:
        if a[1] != b[0]:
            raise AdapterError(f"{part}_a and {part}_b have ranks {a[1]} and {b[0]}")
        return a[0], b[1], a[1]
    there = ", ".join(sorted(role for role in shapes if role.startswith(part))) or "nothing of it"
    raise AdapterError(f"{part}, or {part}_a and {part}_b, must be there; {there} is")


def _part(
    tensor: Callable[[str], Tensor], shapes: Mapping[str, Shape], part: str
) -> tuple[Tensor, Tensor]:
    if part not in shapes:
        return tensor(f"{part}_a"), tensor(f"{part}_b")
    whole = tensor(part)
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows), whole
    return whole, torch.eye(columns)
