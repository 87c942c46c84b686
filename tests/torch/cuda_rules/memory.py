"""Memory: who uses which bytes, and torch's caching allocator as far as others can see it."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tests.torch.cuda_rules.rules import CudaError, Rule
from tests.torch.cuda_rules.streams import Clock, Stream

if TYPE_CHECKING:
    from tests.torch.cuda_rules.graph import Capture
    from tests.torch.cuda_rules.machine import Machine

PoolId = tuple[int, int]
DEFAULT_POOL: PoolId = (0, 0)
GRANULE = 512

Span = tuple[int, int]
"""Bytes from and to."""


class Uses:
    """Last uses of some memory: by stream and bytes, the number of the operation."""

    def __init__(self) -> None:
        self.reads: dict[tuple[int, Span], tuple[int, str]] = {}
        self.writes: dict[tuple[int, Span], tuple[int, str]] = {}

    def conflict(self, clock: Clock, stream: int, span: Span, write: bool) -> str | None:
        """An earlier use that nothing puts before this one."""
        for uses in (self.writes, self.reads) if write else (self.writes,):
            for (other, (start, end)), (number, what) in uses.items():
                overlap = start < span[1] and span[0] < end
                if overlap and other != stream and clock.get(other, 0) < number:
                    return f"{'written' if uses is self.writes else 'read'} by {what}"
        return None

    def note(self, stream: int, span: Span, write: bool, number: int, what: str) -> None:
        if write:
            # What this covers was before it, or there was a conflict.
            for uses in (self.writes, self.reads):
                covered = [k for k in uses if span[0] <= k[1][0] and k[1][1] <= span[1]]
                for key in covered:
                    del uses[key]
        (self.writes if write else self.reads)[stream, span] = (number, what)

    def pending(self, *clocks: Clock) -> dict[int, str]:
        """By stream, uses that no clock knows to be done."""
        found = {}
        for uses in (self.reads, self.writes):
            for (stream, _), (number, what) in uses.items():
                if all(clock.get(stream, 0) < number for clock in clocks):
                    found[stream] = what
        return found


@dataclass(eq=False)
class Memory:
    """One storage.

    Attributes:
        num_bytes: of it.
        stream: on which it was allocated; None of pinned memory.
        pool: of the allocator.
        graph: in whose capture it was allocated.
        value: what a host reads from it, 0 or 1.
        uses: by operations that run, not by those that are captured.
        recorded: streams of `Tensor.record_stream`.
        freed: nobody holds it any more.
        foreign: pinned, and not by torch's allocator.
    """

    num_bytes: int
    stream: Stream | None
    pool: PoolId = DEFAULT_POOL
    graph: "Capture | None" = None
    value: int = 0
    uses: Uses = field(default_factory=Uses)
    recorded: set[int] = field(default_factory=set)
    freed: bool = False
    foreign: bool = False


class Handle:
    """Held by all tensors of a storage; the memory is free when it goes."""

    __slots__ = ("dead", "memory")

    def __init__(self, memory: Memory, dead: Any) -> None:
        self.memory = memory
        self.dead = dead

    def __del__(self) -> None:
        # Perhaps in the midst of anything: the machine looks when it does something next.
        self.dead.append(self.memory)


class Allocator:
    """`torch.cuda.memory`, with a limit, and with failures on demand.

    Attributes:
        limit: bytes of the device.
        recording: pools that `beginAllocateToPool` has opened.
        holders: of each graph's pool; 0 where all are gone.
        count: allocations so far.
        fail_at: the allocations, counted from now on, that fail.
    """

    def __init__(self, machine: "Machine", limit: int) -> None:
        self.machine = machine
        self.limit = limit
        self.recording: list[PoolId] = []
        self.holders: dict[PoolId, int] = {}
        self.count = 0
        self.fail_at: set[int] = set()
        self.allocated = self.peak = 0
        self.reserved = self.peak_reserved = 0
        self.out_of_memory = 0
        self.cached: dict[tuple[PoolId, int], int] = defaultdict(int)
        self.deferred: list[tuple[Memory, int]] = []
        self.limbo: list[tuple[Memory, dict[int, str]]] = []

    def allocate(self, num_bytes: int, stream: Stream, pool: PoolId, graph: Any) -> Memory:
        """Memory for a new storage.

        Raises:
            torch.OutOfMemoryError: there is none, or this one is to fail.
        """
        size = -(-num_bytes // GRANULE) * GRANULE
        self.count += 1
        if self.count in self.fail_at:
            self._out_of_memory(size)
        self._process_deferred()
        self._check_limbo(stream, pool)
        place = (pool, stream.stream_id)
        if self.cached[place] >= size:
            self.cached[place] -= size
        else:
            if self.reserved + size > self.limit:
                self.release_cached()
            if self.reserved + size > self.limit:
                self._out_of_memory(size)
            self.reserved += size
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        return Memory(size, stream, pool, graph)

    def free(self, memory: Memory) -> None:
        """Nobody holds it any more."""
        memory.freed = True
        stream = memory.stream
        if stream is None:
            return
        self.allocated -= memory.num_bytes
        pending = memory.uses.pending(stream.clock, self.machine.host)
        pending.pop(stream.stream_id, None)
        unknown = {s: what for s, what in pending.items() if s not in memory.recorded}
        if unknown and memory.graph is None:
            self.limbo.append((memory, unknown))
        if memory.recorded:
            self.deferred.append((memory, 0))
        else:
            self.cached[memory.pool, stream.stream_id] += memory.num_bytes

    def release_cached(self) -> None:
        """Give cached blocks back; not while a pool is recorded into."""
        if self.recording:
            return
        self._process_deferred(all_of_them=True)
        for place in list(self.cached):
            if place[0] == DEFAULT_POOL or not self.holders.get(place[0]):
                self.reserved -= self.cached.pop(place)

    def begin(self, pool: PoolId) -> None:
        """``beginAllocateToPool``, in its order: it holds the pool before it looks."""
        if self.holders.get(pool) == 0:
            self.machine.fail(Rule.POOL, f"pool {pool} is used again after all its graphs are gone")
        self.holders[pool] = self.holders.get(pool, 0) + 1
        if pool in self.recording:
            self.machine.fail(
                Rule.POOL, f"beginAllocateToPool: already recording to mempool_id {pool}"
            )
        self.recording.append(pool)

    def end(self, pool: PoolId) -> None:
        """``endAllocateToPool``."""
        if pool not in self.recording:
            raise CudaError(f"endAllocatePool: not currently recording to mempool_id {pool}")
        self.recording.remove(pool)

    def release(self, pool: PoolId) -> None:
        """``releasePool``."""
        if not self.holders.get(pool):
            self.machine.fail(Rule.POOL, f"pool {pool} is released more often than it was taken")
        self.holders[pool] -= 1

    @property
    def deferred_bytes(self) -> int:
        """Freed, but still waiting for the streams that were recorded."""
        return sum(memory.num_bytes for memory, _ in self.deferred)

    def _process_deferred(self, all_of_them: bool = False) -> None:
        """Blocks come back at the second look at their events, which nobody takes in a capture."""
        if self.recording:
            return
        waiting = []
        for memory, looks in self.deferred:
            if looks or all_of_them:
                assert memory.stream is not None
                self.cached[memory.pool, memory.stream.stream_id] += memory.num_bytes
            else:
                waiting.append((memory, looks + 1))
        self.deferred = waiting

    def _check_limbo(self, stream: Stream, pool: PoolId) -> None:
        """Whether memory that the allocator may hand out now is still in use elsewhere."""
        kept = []
        for memory, uses in self.limbo:
            if memory.stream is not stream or memory.pool != pool:
                kept.append((memory, uses))
            elif set(memory.uses.pending(stream.clock, self.machine.host)) & set(uses):
                what = ", ".join(uses.values())
                self.limbo.remove((memory, uses))
                self.machine.fail(
                    Rule.LIFETIME,
                    f"{memory.num_bytes} bytes of {stream} were freed while used by {what}, "
                    "which record_stream was not told of",
                )
        self.limbo = kept

    def _out_of_memory(self, size: int) -> None:
        self.out_of_memory += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
