"""What the machine has to know of each of torch's operations."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_READS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal}
_MOVES = {aten.to, aten._to_copy}
_EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_SHAPED_BY_DATA = (
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "bincount",
    "argwhere",
    "repeat_interleave.Tensor",
)
_PLANNED = ("conv", "scaled_dot_product", "attention", "attn", "mm", "linear", "matmul", "einsum")
"""Parts of the names of what cuBLAS, cuDNN or an attention kernel does."""

_KEEPS_VALUE = ("all", "any", "clone", "copy", "amax", "amin", "max", "min", "cat", "stack")


class Operation:
    """One of them.

    Attributes:
        func, packet, name: torch's own.
        reads: it gives the host a number.
        moves: it is `Tensor.to`.
        shaped_by_data: the host has to know the values to know its result's size.
        takes_host_indices: some of its tensors may lie on the host.
        empty: it only allocates.
        absolute: its result's offset does not count from its argument's.
        planned: a library builds a plan for each form of its arguments.
        attention: the plan depends on the back ends that are enabled too.
        returns_list: several results are a list.
        views: its results share the argument's memory, and it changes nothing.
    """

    def __init__(self, func: Any) -> None:
        self.func, self.packet, self.name = func, func.overloadpacket, func.__name__
        self.reads = self.packet in _READS
        self.moves = self.packet in _MOVES
        self.shaped_by_data = self.name.startswith(_SHAPED_BY_DATA)
        self.takes_host_indices = self.packet in _INDEXED
        self.empty = self.packet in _EMPTY
        self.absolute = self.name.startswith("as_strided")
        self.planned = any(part in self.name for part in _PLANNED)
        self.attention = "attention" in self.name
        self.keeps_value = self.name.startswith(_KEEPS_VALUE)
        schema = func._schema
        returns = schema.returns
        self.returns_list = len(returns) == 1 and "List" in str(returns[0].type)
        aliases = [argument.alias_info for argument in schema.arguments]
        self._written = [
            (number, argument.name)
            for number, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.views = any(alias is not None for alias in aliases) and not self._written

    def written(self, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        """Arguments that it changes."""
        found: list[Tensor] = []
        for number, name in self._written:
            value = args[number] if number < len(args) else kwargs.get(name)
            found += value if isinstance(value, (list, tuple)) else [value]
        return [tensor for tensor in found if tensor is not None]

    def value(self, args: Any, first: int) -> int:
        """What a host would read from its result, as far as finiteness and zeros go.

        Args:
            args: of the call.
            first: of the first tensor that it reads.
        """
        name = self.name
        if self.keeps_value:
            return first
        if name.startswith(("isfinite", "ones")):
            return 1
        if name.startswith(("logical_not", "bitwise_not")):
            return 1 - first
        if name.startswith("ne.Scalar"):
            return int(first != args[1])
        if name.startswith("eq.Scalar"):
            return int(first == args[1])
        return 0


@cache
def operation(func: Any) -> Operation:
    """By torch's name for it."""
    return Operation(func)
