"""Work that runs on the GPU beside the main stream."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class SideJob(Protocol):
    """Work under way."""

    def result(self) -> tuple[Tensor, ...] | None:
        """Its tensors, on the host, or None while they are not there."""


class SideStream(Protocol):
    """Where such work is started."""

    def start(
        self, function: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> SideJob:
        """Start a function that queues work and returns device tensors.

        Args:
            function: must not wait for the device.
            inputs: tensors of the main stream that it reads.
        """


class CudaSideStream:
    """A CUDA stream of its own. Its kernels share the GPU with those of the main stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(
        self, function: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> "CudaJob":
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor in inputs:
                # Or the allocator would hand out its memory once the main stream is done with it.
                tensor.record_stream(self._stream)
            found = []
            for tensor in function():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                found.append(host.copy_(tensor, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self._stream)
        return CudaJob(tuple(found), event)


class CudaJob:
    def __init__(self, tensors: tuple[Tensor, ...], event: "torch.cuda.Event") -> None:
        self._tensors = tensors
        self._event = event

    def result(self) -> tuple[Tensor, ...] | None:
        return self._tensors if self._event.query() else None
