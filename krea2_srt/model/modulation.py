"""Time modulation, looked up instead of computed.

Each block scales, shifts and gates its two branches by six vectors that depend on the timestep
alone. For a schedule of n steps they are computed once, for all blocks, and the norm's own scale
is multiplied into them:

    norm(x) * norm_scale * (1 + scale) + shift  =  norm(x) * table.scale + table.shift
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """Modulation vectors of all blocks, a row per step of a schedule or per sequence of a pack.

    Attributes:
        scales: float32 [rows, layers, 2, hidden], effective norm scales before attention and
            before the MLP.
        shifts: float32, same shape.
        gates: compute dtype, same shape, of the attention and the MLP branch.
        final_scale: float32 [rows, hidden], effective norm scale of the final layer.
        final_shift: float32 [rows, hidden].
    """

    scales: Tensor
    shifts: Tensor
    gates: Tensor
    final_scale: Tensor
    final_shift: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, rows first."""
        return (self.scales, self.shifts, self.gates, self.final_scale, self.final_shift)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def row(self, index: int) -> "Modulation":
        """One row, without a copy."""
        return self.rows(index, index + 1)

    def rows(self, start: int, end: int) -> "Modulation":
        """Some rows, without a copy."""
        return Modulation(*(tensor[start:end] for tensor in self.tensors))

    @staticmethod
    def stack(rows: "list[Modulation]") -> "Modulation":
        """The rows of several modulations, one below another."""
        if len(rows) == 1:
            return rows[0]
        return Modulation(*map(torch.cat, zip(*(row.tensors for row in rows), strict=True)))


def timestep_embedding(timesteps: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding of flow time, cosines first.

    Args:
        timesteps: [n] in [0, 1]; 1 is pure noise.
        size: width of the embedding, even.

    Returns:
        float32 [n, size].
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(1e4) * steps / half)
    angles = timesteps.float()[:, None] * 1e3 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
