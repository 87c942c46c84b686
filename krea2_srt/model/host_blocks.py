"""Blocks whose matrices are in host memory, and on the device only while they run.

All matrices of such a block lie in one piece of memory, in 8 bits with their scales, so that one
copy brings it to the device. They are no parameters: `Module.to` leaves them where they are. Norms
and tables, a two-thousandth of a block, stay on the device.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from krea2_srt.model.layers import Linear, LinearFactory
from krea2_srt.model.pinned_memory import pinned_bytes

_ALIGNMENT = 256
"""Bytes. What torch's allocator gives a tensor of its own, and more than any kernel asks for."""


class BlockWeights(Protocol):
    """Brings the matrices of blocks to the device."""

    def on_device(self, block: int) -> AbstractContextManager[None]:
        """Within it the block's matrices are on the device, for what is queued on the stream that
        is current when it begins and ends.

        Raises:
            torch.OutOfMemoryError: there is no room for them.
        """
        ...


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a matrix lies in the memory of its block."""

    linear: Linear
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.stop].view(self.dtype).view(self.shape)


class HostBlock:
    """The matrices of one block in one piece of host memory.

    Args:
        linears: of the block, from `without_memory`; they are on the host from now on.
        pinned: whether a device copies from it.

    Attributes:
        linears: the same.
        memory: uint8 [bytes], on the host.
    """

    def __init__(self, linears: Sequence[Linear], pinned: bool) -> None:
        self.linears = tuple(linears)
        self._places: list[_Place] = []
        end = 0
        for linear in linears:
            for name in ("weight", "scale"):
                tensor = getattr(linear, name)
                if tensor is not None:
                    start = -(-end // _ALIGNMENT) * _ALIGNMENT
                    place = _Place(linear, name, start, tensor.shape, tensor.dtype)
                    self._places.append(place)
                    end = place.stop
                    # No parameter any more, but an attribute like others.
                    delattr(linear, name)
        self.memory = pinned_bytes(end) if pinned else torch.zeros(end, dtype=torch.uint8)
        self._home = self.views(self.memory)
        self.hide()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self.memory.nbytes

    def views(self, memory: Tensor) -> tuple[Tensor, ...]:
        """The block's weights and scales in some memory.

        Args:
            memory: uint8 [at least ``nbytes``], the block's own or a copy of it.
        """
        return tuple(place.of(memory) for place in self._places)

    def show(self, views: Sequence[Tensor]) -> None:
        """Have the matrices multiply with what `views` has given."""
        for place, view in zip(self._places, views, strict=True):
            setattr(place.linear, place.name, view)

    def hide(self) -> None:
        """Have them be on the host again, where nothing can read them by mistake that is for the
        device.
        """
        self.show(self._home)


def without_memory(linears: LinearFactory) -> LinearFactory:
    """A factory of the same layers, whose weights have no memory until they are a `HostBlock`'s."""

    def make(name: str, in_features: int, parts: dict[str, int]) -> Linear:
        with torch.device("meta"):
            return linears(name, in_features, parts)

    return make
