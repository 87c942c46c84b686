"""Copies to a GPU beside what it computes, in an order that events make."""

from typing import Protocol

import torch
from torch import Tensor


class Moment(Protocol):
    """When all that was queued on a stream is done; `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Have the host wait for it."""
        ...


class UploadStream(Protocol):
    """Copies from the host, one after another, beside what is computed."""

    def upload(self, target: Tensor, source: Tensor, after: Moment | None) -> Moment:
        """Queue a copy; nobody waits.

        Args:
            target: on the device.
            source: of the same shape and dtype, in pinned memory.
            after: when the target may be overwritten; None is at once.

        Returns:
            When it is done.
        """
        ...

    def mark(self) -> Moment:
        """When all is done that has been queued on the current stream."""
        ...

    def wait(self, moment: Moment) -> None:
        """Have what is queued on the current stream from now on wait; the host does not."""
        ...


class CudaUploadStream:
    """See `UploadStream`.

    Args:
        device: to which it copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def upload(self, target: Tensor, source: Tensor, after: Moment | None) -> Moment:
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def mark(self) -> Moment:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, moment: Moment) -> None:
        assert isinstance(moment, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(moment)
