"""Rotary position embedding over (frame, row, column), interleaved pairs."""

import torch
from torch import Tensor


def rope_rotations(coordinates: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Rotation of every query/key pair, as a unit complex number.

    Args:
        coordinates: [T, len(axes_dims)] token positions, any real dtype.
        axes_dims: how the head dimension is split over the axes; each even.
        theta: frequency base.

    Returns:
        complex64 [T, sum(axes_dims) / 2]. Angles are computed in float64, as the released
        code does, so that large coordinates keep their phase.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=coordinates.device) / dim
        angles.append(torch.outer(coordinates[:, axis].double(), theta**-exponent))
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
