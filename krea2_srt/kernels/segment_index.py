"""Which row of a table each token of a pack reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SegmentIndex:
    """The sequence of each token: kernels look it up, torch code goes by spans.

    Attributes:
        index: int32 [T], the row of each token.
        spans: (start, end, row) of consecutive tokens with one row, covering all T tokens; None
            where ``index`` changes from call to call and only the device knows it, as under a
            captured graph.
    """

    index: Tensor
    spans: tuple[tuple[int, int, int], ...] | None

    def of_tokens(self, table: Tensor) -> Tensor:
        """[rows, width] -> [T, width], each token's row."""
        if self.spans is not None and len(self.spans) == 1:
            row = self.spans[0][2]
            return table[row : row + 1].expand(len(self.index), -1)
        return table.index_select(0, self.index)
