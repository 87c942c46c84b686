"""Blocks that come from host memory while others run: `krea2_srt.model.host_blocks.BlockWeights`.

    blocks      0   1*  2   3   4*  5   6   7*  8        * on the host
    compute     0---1---2---3---4---5---6---7---8---0---1---...
    uploads             7---------- 1------     4----

Two buffers on the device hold a block each: one runs while the next one is on its way. A block that
has run leaves its buffer to the one after the next, so uploads are queued as early as there is
room for them, before the next block is waited for, and after the last block of a step come the
first ones of the next step. The order between the streams is made by events, and the host waits for
nothing.

What is expected is the next block on the host, in a circle. A step that is dropped, fails or lets
another one run before it goes on comes as a surprise: its block is uploaded when it is needed, and
the device waits that long.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from krea2_srt.model.host_blocks import HostBlock
from krea2_srt.runner.streamed_blocks import BUFFERS
from krea2_srt.runner.upload_stream import Moment, UploadStream

_RESIDENT = nullcontext()


@dataclass(eq=False)
class _Buffer:
    """Room for one block on the device.

    Attributes:
        memory: uint8 [bytes of the largest block].
        free: when what was in it has been read; None as long as nothing was.
        block: whose matrices are in it, or on their way.
        ready: when they are there.
        views: of each block that was in it, as they are made once.
    """

    memory: Tensor
    free: Moment | None
    block: int | None = None
    ready: Moment | None = None
    views: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


class BlockStream:
    """Uploads the matrices of blocks in time.

    All calls belong to one thread. A block may run on another stream than the one before it, if
    that waits for what the other one has been told.

    Args:
        blocks: those on the host, by number; at least one.
        device: where they run.
        uploads: copies them.

    Attributes:
        uploads_queued: how many blocks were uploaded.
        late: how many of them were not expected, so that the device had to wait.
    """

    def __init__(
        self, blocks: Mapping[int, HostBlock], device: torch.device, uploads: UploadStream
    ) -> None:
        self._buffers: list[_Buffer] = []
        self.uploads_queued = self.late = 0
        self._blocks = dict(blocks)
        self._device = device
        self._uploads = uploads
        order = sorted(self._blocks)
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        self._first = order[0]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def buffer_bytes(self) -> int:
        """Bytes on the device, while there are buffers."""
        return min(BUFFERS, len(self)) * max(b.nbytes for b in self._blocks.values())

    def prepare(self) -> None:
        """Make the buffers, if there are none, and have the first blocks on their way.

        Raises:
            torch.OutOfMemoryError: there is no room.
        """
        self._make_buffers()
        self._expect(self._first)

    def on_device(self, block: int) -> AbstractContextManager[None]:
        return self._streamed(block) if block in self._blocks else _RESIDENT

    def statistics(self) -> dict[str, int]:
        """Counters."""
        return {
            "streamed_blocks": len(self),
            "streamed_block_uploads": self.uploads_queued,
            "streamed_block_uploads_late": self.late,
        }

    def release(self) -> None:
        """Give the device's memory back, once nothing uses it any more: the host waits for that.
        The next block that runs, or `prepare`, takes it again.
        """
        for buffer in self._buffers:
            for moment in (buffer.free, buffer.ready):
                if moment is not None:
                    moment.synchronize()
        self._buffers.clear()

    def __del__(self) -> None:
        # The host's memory may go next, and the device may still read it; where it is lost, not.
        with suppress(RuntimeError):
            self.release()

    @contextmanager
    def _streamed(self, block: int) -> Iterator[None]:
        self._make_buffers()
        buffer = self._holding(block)
        if buffer is None:
            self.late += 1
            buffer = self._upload(block, keep=self._next[block])
        self._expect(block)
        assert buffer.ready is not None
        self._uploads.wait(buffer.ready)
        host = self._blocks[block]
        host.show(buffer.views[block])
        try:
            yield
        finally:
            host.hide()
            # Also of a block that failed: some of it may have been queued.
            buffer.free = self._uploads.mark()
        self._expect(self._next[block])

    def _expect(self, block: int) -> None:
        """Have a block and the one after it in the buffers, or on their way."""
        after = self._next[block]
        if self._holding(block) is None:
            self._upload(block, keep=after)
        if self._holding(after) is None:
            self._upload(after, keep=block)

    def _holding(self, block: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block == block), None)

    @torch.inference_mode()
    def _upload(self, block: int, keep: int) -> _Buffer:
        """Queue the upload of a block over another than the one that is kept."""
        buffer = next(buffer for buffer in self._buffers if buffer.block != keep)
        source = self._blocks[block].memory
        # Should the copy fail, the buffer holds nothing.
        buffer.block = None
        target = buffer.memory[: source.nbytes]
        buffer.ready = self._uploads.upload(target, source, buffer.free)
        buffer.block = block
        self.uploads_queued += 1
        if block not in buffer.views:
            buffer.views[block] = self._blocks[block].views(buffer.memory)
        return buffer

    @torch.inference_mode()
    def _make_buffers(self) -> None:
        """All or none."""
        if self._buffers:
            return
        largest = max(block.nbytes for block in self._blocks.values())
        memories = [
            torch.empty(largest, dtype=torch.uint8, device=self._device)
            for _ in range(min(BUFFERS, len(self)))
        ]
        # What the allocator had lent before may still be in use on the current stream.
        self._buffers = [_Buffer(memory, self._uploads.mark()) for memory in memories]
