"""How work on static buffers becomes a graph that repeats it."""

import gc
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

import torch

from krea2_srt.runner.graph_pool import GraphPool

Replay = Callable[[], None]


class Capture(Protocol):
    """Turns a function that queues work on static buffers into one that repeats it."""

    def __call__(self, function: Callable[[], object]) -> Replay: ...


class CudaCapture:
    """`Capture` as a CUDA graph. All graphs of one share a pool of memory: only one runs at a time.

    Args:
        device: a GPU.
        priority: of the stream that is captured, which the kernels of its graphs keep.
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)
        self._pool: GraphPool | None = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def __call__(self, function: Callable[[], object]) -> Replay:
        try:
            return self._capture(function)
        except torch.OutOfMemoryError:
            pass
        # What the allocator keeps for reuse it does not give to a pool. Here, where no traceback
        # holds what the first try has allocated.
        torch.cuda.empty_cache()
        return self._capture(function)

    def _capture(self, function: Callable[[], object]) -> Replay:
        if self._pool is None or not self._alive:
            # A pool that no graph holds any more cannot be captured into. Those in pools that a
            # failed capture has ended do not hold this one.
            self._pool, self._alive = GraphPool(self._device), WeakSet()
        pool = self._pool
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with pool.held():
            with torch.cuda.stream(self._stream), pool.allocated_from():
                # Kernels are built and library handles made here: not possible under capture. In
                # the pool, or there would be a second one of the same size.
                function()
            self._stream.synchronize()
            graph = self._record(function, pool)
        self._alive.add(graph)
        return graph.replay

    def _record(self, function: Callable[[], object], pool: GraphPool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache first: a
        # pause while requests wait. The collector just must not free device objects in between.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                try:
                    # Thread-local: other threads may allocate pinned memory meanwhile.
                    graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
                    error = _error_of(function)
                    try:
                        graph.capture_end()
                    except Exception as at_end:
                        # That the capture is invalid follows from the first error, if there is one.
                        raise (error or at_end) from None
                    if error is not None:
                        raise error
                except BaseException:
                    if pool.end_capture():
                        # Torch has left a function with the address of the graph in its allocator
                        # of pinned memory: the graph must stay.
                        self._failed.append(graph)
                        self._pool = None
                    raise
        finally:
            if collecting:
                gc.enable()
        return graph


def _error_of(function: Callable[[], object]) -> BaseException | None:
    """What a function raises."""
    try:
        function()
    except BaseException as error:
        return error
    return None
