"""Work that runs on the GPU beside the main stream."""

import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[[], tuple[Tensor, ...]]
"""Queues work and returns device tensors, without waiting for the device."""


class SideJob(Protocol):
    """Work under way."""

    def result(self) -> tuple[Tensor, ...] | None:
        """Its tensors, on the host, or None while they are not there. Raises what it raised."""


class SideStream(Protocol):
    """Where such work is started."""

    def start(self, function: Function, inputs: tuple[Tensor, ...]) -> SideJob:
        """Start some work, which runs after all that has been started before.

        Args:
            function: what to do.
            inputs: tensors of the current stream that it reads.
        """

    def wait(self) -> None:
        """Wait until nothing is under way."""

    def close(self) -> None:
        """Take nothing more, and wait."""


class CudaSideStream:
    """A CUDA stream of its own. Its kernels share the GPU with those of the main stream.

    Work is launched by a thread of its own too: a large decode is hundreds of launches, in which
    no step could be launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._jobs: SimpleQueue[CudaJob | None] = SimpleQueue()
        self._last: CudaJob | None = None
        self._thread = threading.Thread(target=self._run, name="krea2-srt side stream", daemon=True)
        self._thread.start()

    def start(self, function: Function, inputs: tuple[Tensor, ...]) -> "CudaJob":
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        for tensor in inputs:
            # Or the allocator would hand out its memory once the current stream is done with it.
            tensor.record_stream(self._stream)
        self._last = job = CudaJob(function, inputs, ready)
        self._jobs.put(job)
        return job

    def wait(self) -> None:
        if self._last is not None:
            self._last.launched.wait()
            self._stream.synchronize()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        # Of a thread: the device, the stream, and that nothing is recorded for gradients.
        device, stream = torch.cuda.device(self._device), torch.cuda.stream(self._stream)
        with torch.inference_mode(), device, stream:
            while (job := self._jobs.get()) is not None:
                job.launch(self._stream)
                del job  # or it would live until the next one comes


class CudaJob:
    """One piece of work.

    Attributes:
        launched: set once the device has been told of it, or it has failed.
    """

    def __init__(
        self, function: Function, inputs: tuple[Tensor, ...], ready: "torch.cuda.Event"
    ) -> None:
        self.launched = threading.Event()
        # Its inputs live until the device has been told to read them: from then on the allocator
        # knows of the stream.
        self._work: tuple[Function, tuple[Tensor, ...]] | None = (function, inputs)
        self._ready = ready
        self._done = torch.cuda.Event()
        self._tensors: tuple[Tensor, ...] = ()
        self._error: BaseException | None = None

    def launch(self, stream: "torch.cuda.Stream") -> None:
        """Tell the device, in the thread and on the stream of such work."""
        assert self._work is not None
        try:
            stream.wait_event(self._ready)
            self._tensors = _to_host(self._work[0]())
            self._done.record(stream)
        except BaseException as error:
            # Its frames hold its tensors, and steps need their memory before anybody asks.
            traceback.clear_frames(error.__traceback__)
            self._error = error
        self._work = None
        self.launched.set()

    def result(self) -> tuple[Tensor, ...] | None:
        if not self.launched.is_set():
            return None
        if self._error is not None:
            raise self._error
        return self._tensors if self._done.query() else None


def _to_host(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies in pinned memory, under way."""
    found = []
    for tensor in tensors:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        found.append(host.copy_(tensor, non_blocking=True))
    return tuple(found)
