"""The memory that CUDA graphs share, in torch's allocator."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GraphPool:
    """A pool of the allocator, which belongs to whoever holds it: graphs, and `held`.

    Torch has no public functions for a part of this; these are those of `torch.cuda.use_mem_pool`.

    Args:
        device: a GPU.

    Attributes:
        id: what `torch.cuda.CUDAGraph.capture_begin` takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.id = torch.cuda.graph_pool_handle()
        index = device.index
        self._index = torch.cuda.current_device() if index is None else index
        self._holds = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep what was allocated from it, until a graph holds it too."""
        try:
            yield
        finally:
            self._release_all()

    @contextmanager
    def allocated_from(self) -> Iterator[None]:
        """Allocate this thread's tensors from it; inside of `held`."""
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self.id)
        self._holds += 1
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(self._index, self.id)

    def end_capture(self) -> bool:
        """After a capture that has failed.

        Torch ends the allocation into the pool only where CUDA ends the capture without an error.
        Otherwise it would go on for ever: the next capture into the pool would be refused, and the
        allocator, out of memory, would keep what it could give back.

        Returns:
            Whether the allocation had to be ended: the pool is of no use for graphs any more.
        """
        try:
            torch._C._cuda_endAllocateToPool(self._index, self.id)
        except RuntimeError:
            return False  # a graph that had got so far lets go of the pool itself
        self._holds += 1
        return True

    def _release_all(self) -> None:
        while self._holds:
            self._holds -= 1
            torch._C._cuda_releasePool(self._index, self.id)
