"""Adapters beside the model's matrices, from slots: `krea2_srt.model.deltas.Deltas`.

The same sums as `krea2_srt.lora.beside.PackDeltas`, but the host does not know which adapters are
in them: it launches two kernels for each matrix, which read that on the device. So a CUDA graph of
them serves other adapters than it was captured with.
"""

from torch import Tensor, nn

from krea2_srt.kernels.operations import Operations
from krea2_srt.kernels.quantize import Tokens
from krea2_srt.lora.slots import AdapterSlots


class SlotDeltas:
    """What the adapters in slots add to the tokens of a pack.

    Args:
        slots: where the adapters are.
        operations: whose `lora_shrink` and `lora_expand` multiply.
        index: int32 [T], the row of each token.
        numbers: int32 [rows, 4], the slots of each row's adapters, -1 for none.
        scales: float32 [rows, 4].
    """

    def __init__(
        self,
        slots: AdapterSlots,
        operations: Operations,
        index: Tensor,
        numbers: Tensor,
        scales: Tensor,
    ) -> None:
        self._matrices = slots.matrices
        self._operations = operations
        self._index = index
        self._numbers = numbers
        self._scales = scales

    def touch(self, linear: nn.Module) -> bool:
        """Whether the matrix has slots; what is in them the host does not know."""
        return linear in self._matrices

    def add(self, linear: nn.Module, x: Tokens, out: Tensor) -> None:
        mine = self._matrices.get(linear)
        if mine is None:
            return
        do, index, numbers = self._operations, self._index, self._numbers
        h = do.lora_shrink(x, mine.down, index, numbers, mine.parts)
        do.lora_expand(out, h, mine.up, index, numbers, self._scales, mine.part_starts)
