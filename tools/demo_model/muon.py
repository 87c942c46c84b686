"""Muon: momentum whose update is made orthogonal, matrix by matrix.

torch's own always works in bfloat16, and on one matrix at a time.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tools.demo_model.precision import FASTEST

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 4


class Muon(torch.optim.Optimizer):
    """See https://kellerjordan.github.io/posts/muon/.

    Args:
        matrices: of two dimensions, or kernels of convolutions, whose dimensions after the first
            count as one; those of one shape are stepped together.
        lr: of updates whose singular values are about 1, times the root of a tall matrix' aspect.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[tuple(matrix.shape)].append(matrix)
        super().__init__([{"params": same} for same in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            matrices = group["params"]
            state = self.state[matrices[0]]
            gradient = torch.stack([matrix.grad for matrix in matrices]).flatten(2)
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"]
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, _MOMENTUM).to(FASTEST)).float()
            lr = group["lr"] * max(1, update.shape[1] / update.shape[2]) ** 0.5
            update = update.view(len(matrices), *matrices[0].shape)
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns]: the nearest ones with singular values of 1, or nearly.

    By Newton-Schulz iterations, which need multiplications only.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
