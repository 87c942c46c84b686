"""What is added to the products of matrices: how adapters stand beside a model."""

from typing import Protocol

from torch import Tensor, nn

from krea2_srt.kernels.quantize import Tokens


class Deltas(Protocol):
    """Changes of some matrices, which differ from row to row of what is multiplied.

    They are those of one forward, and are handed down to each matrix of it.
    """

    def touch(self, linear: nn.Module) -> bool:
        """Whether they change this matrix for any row."""
        ...

    def add(self, linear: nn.Module, x: Tokens, out: Tensor) -> None:
        """Add a matrix's changes to its product, in place.

        Args:
            linear: the matrix.
            x: [..., in], what it was multiplied with.
            out: [..., rows of the matrix], the product.
        """
        ...
