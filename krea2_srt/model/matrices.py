"""The DiT's matrices by their names in a checkpoint: what an adapter can change, and where."""

from dataclasses import dataclass

import torch

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.layers import Linear


@dataclass(frozen=True)
class Matrix:
    """A matrix of a checkpoint: some rows of one of the DiT's `Linear`s.

    Attributes:
        linear: name of that `Linear` in the DiT, as in ``blocks.0.attn.qkvg``.
        start: its first row there.
        shape: [out, in]: the rows, and the width of what is multiplied.
    """

    linear: str
    start: int
    shape: tuple[int, int]

    @property
    def stop(self) -> int:
        """The row of the `Linear` that follows its last one."""
        return self.start + self.shape[0]


def dit_matrices(config: Krea2Config) -> dict[str, Matrix]:
    """All matrices of a DiT by Diffusers name, as in ``transformer_blocks.0.attn.to_q``."""
    with torch.device("meta"):  # takes no memory
        return matrices_of(Krea2DiT(config, torch.bfloat16))


def matrices_of(dit: Krea2DiT) -> dict[str, Matrix]:
    """The same of one that is there."""
    names = {
        id(module.weight): name
        for name, module in dit.named_modules()
        if isinstance(module, Linear)
    }
    return {
        name.removesuffix(".weight"): Matrix(
            names[id(slot.rows_of)], slot.start, (slot.view.shape[0], slot.view.shape[1])
        )
        for name, slot in dit.weight_map().items()
        if slot.rows_of is not None
    }
