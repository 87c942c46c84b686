"""CUDA graphs, all of them: which sizes they serve, how they are captured, and who replays them.

A graph reads and writes fixed places in memory, so every step copies what its pack is made of
into the buffers, replays, and copies the result out. The pack is padded to the graph's number of
tokens with a segment of its own, whose tokens nobody reads.
"""

import gc
import logging
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import NamedTuple, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.lora.slot_deltas import SlotDeltas
from krea2_srt.lora.slots import AdapterSlots
from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import copy_to
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack, Segments
from krea2_srt.model.text_encoder import PREFIX_TOKENS, kept_tokens, padded
from krea2_srt.request import MAX_ADAPTERS
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.packing import ForwardBatch

logger = logging.getLogger(__name__)


# Which captured graph serves a pack: sizes rounded up, so that few graphs serve all packs.


MAX_PADDING = 0.03
"""Share of a step's time that padding may add. From `FEW_TOKENS` on it grows with the tokens, so of
the tokens too.
"""

FEW_TOKENS = 160
"""Below this, a step takes as long as reading the weights, however many tokens there are: on an
H200 up to 184, on GPUs with more arithmetic per byte of bandwidth more."""

_GRANULE = 4
_SMALL_GRANULE = 32


@dataclass(frozen=True)
class GraphKey:
    """What a graph is captured for.

    Attributes:
        tokens: of the padded pack.
        segments: most of them, the padding's own included.
        longest: most tokens of a segment.
        steps: 1 for one step of a pack; for a lone sequence all steps of its schedule.
        adapters: whether any sequence has one. Which is read from the buffers.
    """

    tokens: int
    segments: int
    longest: int
    steps: int = 1
    adapters: bool = False

    def __str__(self) -> str:
        whole = f", {self.steps} steps" if self.steps > 1 else ""
        adapters = ", with adapters" if self.adapters else ""
        segments = f"{self.segments} segments of up to {self.longest}"
        return f"{self.tokens} tokens in up to {segments}{whole}{adapters}"


class Buckets:
    """The ladder of token counts, and the keys made of it.

    Args:
        max_tokens: the most that a graph takes.
        max_segments: the most that a graph takes, the padding's own included.
    """

    def __init__(self, max_tokens: int, max_segments: int) -> None:
        self.tokens = token_buckets(max_tokens)
        self.max_segments = max_segments

    def key(self, lengths: list[int], steps: int = 1, adapters: bool = False) -> GraphKey | None:
        """The key of a pack of segments of these lengths; None if it is too large for a graph."""
        place = bisect_left(self.tokens, sum(lengths))
        segments = _power_of_two(len(lengths) + 1)
        # A whole schedule has a row for each step where a pack has one for each segment.
        if place == len(self.tokens) or max(segments, steps) > self.max_segments:
            return None
        tokens = self.tokens[place]
        # Attention kernels start work for every segment as if it were the longest. The padding is
        # a segment too, of fewer tokens than the step of the ladder.
        padding = tokens - (self.tokens[place - 1] if place else 0)
        longest = min(tokens, _power_of_two(max(*lengths, padding)))
        return GraphKey(tokens, segments, longest, steps, adapters)


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Rising token counts up to exactly ``max_tokens``.

    Any pack is padded to the next one, which costs less than `MAX_PADDING` of its time.
    """
    found = list(range(_SMALL_GRANULE, FEW_TOKENS + 1, _SMALL_GRANULE))
    while found[-1] < max_tokens:
        wider = int(found[-1] * (1 + MAX_PADDING)) // _GRANULE * _GRANULE
        found.append(max(wider, found[-1] + _GRANULE))
    return (*(tokens for tokens in found if tokens < max_tokens), max_tokens)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# What became of the work that graphs are for: why some of it ran without, how often.


class Eager(Enum):
    """Why something ran kernel by kernel though graphs are on."""

    TOO_LARGE = "too_large"
    """For any graph: too many tokens, segments, prompts or steps."""

    FIRST_USE = "first_use"
    """Its size has not come before, and a capture takes as long as it runs."""

    FAILED = "failed"
    """The capture for its size has failed."""

    ADAPTERS = "adapters"
    """It is a prompt with adapters, or a pack with some that do not fit into slots."""


@dataclass
class GraphRecord:
    """What graphs of one kind have done.

    Attributes:
        kind: what they do, for the log.
        replayed: times that one was.
        eager: times that none was, by the reason.
        failures: of captures: the size in words, and the first line of why.
    """

    kind: str
    replayed: int = 0
    eager: dict[Eager, int] = field(default_factory=lambda: dict.fromkeys(Eager, 0))
    failures: dict[str, str] = field(default_factory=dict)
    _short_of_memory: set[str] = field(default_factory=set)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def failed(self, size: str, error: Exception) -> None:
        """Note that a capture has failed, and say so once."""
        reason = first_line(error)
        self.failures[size] = reason
        if isinstance(error, torch.OutOfMemoryError):
            self._short_of_memory.add(size)
        if (size, reason) not in self._logged:
            self._logged.add((size, reason))
            logger.warning("krea2-srt: %s graphs off for %s: %s", self.kind, size, reason)

    def memory_freed(self) -> None:
        """Captures that failed for want of memory alone may be tried again."""
        for size in self._short_of_memory:
            del self.failures[size]
        self._short_of_memory.clear()


# The memory that CUDA graphs share, in torch's allocator.


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


# How work on static buffers becomes a graph that repeats it.


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


# Steps: one captured forward per bucket, replayed on static buffers.


MAX_SEGMENTS = 64
"""Most segments of a graph, its padding's included; every one has a row of modulation in the
buffers.
"""


@dataclass(frozen=True)
class StepBuffers:
    """What graphs read and write; a graph of fewer tokens uses the first of them.

    Attributes:
        tokens, velocity: float32 [T, channels], see `krea2_srt.kernels.euler`.
        context: [T, hidden] in the compute dtype.
        rope, row, is_text, uncond_index: see `Pack`.
        cu_seqlens: int32 [segments + 1].
        scalars: float32 [2, rows], dt and guidance.
        modulation: of ``rows`` rows: one per branch of a pack, or one per step of a lone sequence.
        slots: int32 [rows, 4], each branch's of `AdapterSlots`, -1 for none.
        scales: float32 [rows, 4], of the adapters in them.
        non_finite: int32 [rows].
    """

    tokens: Tensor
    velocity: Tensor
    context: Tensor
    rope: Tensor
    row: Tensor
    is_text: Tensor
    uncond_index: Tensor
    cu_seqlens: Tensor
    scalars: Tensor
    modulation: Modulation
    slots: Tensor
    scales: Tensor
    non_finite: Tensor

    @classmethod
    def empty(
        cls,
        config: Krea2Config,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        max_rows: int,
    ) -> "StepBuffers":
        """Buffers of zeros, which are as good as any tokens where padding reads them."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        hidden, table = config.hidden_size, (max_rows, config.num_layers, 2, config.hidden_size)
        return cls(
            tokens=zeros(max_tokens, config.in_channels),
            velocity=zeros(max_tokens, config.in_channels),
            context=zeros(max_tokens, hidden, dtype=dtype),
            rope=zeros(max_tokens, config.attention_head_dim // 2, dtype=torch.complex64),
            row=zeros(max_tokens, dtype=torch.int32),
            is_text=zeros(max_tokens, 1, dtype=torch.bool),
            uncond_index=zeros(max_tokens, dtype=torch.int32),
            cu_seqlens=zeros(max_rows + 1, dtype=torch.int32),
            scalars=zeros(2, max_rows),
            modulation=Modulation(
                zeros(*table),
                zeros(*table),
                zeros(*table, dtype=dtype),
                zeros(max_rows, hidden),
                zeros(max_rows, hidden),
            ),
            slots=zeros(max_rows, MAX_ADAPTERS, dtype=torch.int32).fill_(-1),
            scales=zeros(max_rows, MAX_ADAPTERS),
            non_finite=zeros(max_rows, dtype=torch.int32),
        )

    def pack(self, key: GraphKey) -> Pack:
        """The pack that lies in the buffers, as far as the host knows it."""
        n = key.tokens
        return Pack(
            Segments(self.cu_seqlens[: key.segments + 1], (), key.longest),
            (),
            (),
            self.rope[:n],
            SegmentIndex(self.row[:n], None),
            self.is_text[:n],
            self.uncond_index[:n],
        )

    def load(
        self,
        key: GraphKey,
        batch: ForwardBatch,
        pack: Pack,
        placed: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Copy a pack in, padded to the key's tokens.

        Args:
            key: what it is captured for.
            batch: the pack.
            pack: its layout.
            placed: the slot of each of its adapters, by digest.
        """
        n = pack.num_tokens
        self._load_layout(key, pack)
        places = [self.tokens[start:end] for start, end in pack.image_spans]
        torch._foreach_copy_(places, batch.tokens)
        places = [self.context[start:end] for start, end in pack.text_spans]
        torch._foreach_copy_(places, list(batch.contexts))
        self.context[n : key.tokens].zero_()
        if key.steps > 1:
            (state,) = batch.states
            rows = [state.modulation.row(step) for step in range(key.steps)]
            sigmas = state.schedule.sigmas
            scalars = [[b - a for a, b in pairwise(sigmas)]]
            scalars.append([0.0] * key.steps)
        else:
            rows, scalars = batch.modulations, [batch.dt, batch.guidance]
        own: list[Tensor] = []
        sources: list[Tensor] = []
        for at, row in enumerate(rows):
            own += self.modulation.row(at).tensors
            sources += row.tensors
        torch._foreach_copy_(own, sources)
        unused = [0.0] * (self.scalars.shape[1] - len(rows))
        copy_to(self.scalars, torch.tensor([some + unused for some in scalars]))
        if key.adapters:
            self._load_adapters(batch, placed)

    def _load_adapters(self, batch: ForwardBatch, placed: Mapping[str, int]) -> None:
        numbers, scales = batch.adapter_rows(placed)
        unused = len(self.slots) - len(numbers)
        numbers += [[-1] * MAX_ADAPTERS] * unused
        scales += [[0.0] * MAX_ADAPTERS] * unused
        copy_to(self.slots, torch.tensor(numbers, dtype=torch.int32))
        copy_to(self.scales, torch.tensor(scales, dtype=torch.float32))

    def _load_layout(self, key: GraphKey, pack: Pack) -> None:
        n, count = pack.num_tokens, len(pack.segments.spans)
        self.rope[:n].copy_(pack.rope)
        self.row[:n].copy_(pack.rows.index)
        self.is_text[:n].copy_(pack.is_text)
        self.uncond_index[:n].copy_(pack.uncond_index)
        self.cu_seqlens[: count + 1].copy_(pack.segments.cu_seqlens)
        # The padding is text of the first row in a segment of its own, and takes no step. Segments
        # after it are empty.
        self.row[n : key.tokens].zero_()
        self.is_text[n : key.tokens].fill_(True)
        self.uncond_index[n : key.tokens].fill_(-1)
        self.cu_seqlens[count + 1 : key.segments + 1].fill_(key.tokens)


class StepGraphs:
    """Steps packs by replaying graphs.

    A capture takes as long as some steps, so that of a bucket waits for its second picture.

    Args:
        dit: whose weights stay where they are; see `release`.
        attention: one that reads segment offsets on the device.
        capture: how graphs are captured.
        max_tokens: of a graph.
        max_segments: of a graph, its padding's own included.
        max_graphs: kept at a time, a whole schedule for as many as it has steps; the one used last
            longest ago makes room.
        adapter_slots: where adapters are; without, packs that have any run eagerly.

    Attributes:
        adapter_slots: where adapters are; None without.
        max_tokens: of a graph.
        record: what they have done.
    """

    def __init__(
        self,
        dit: Krea2DiT,
        attention: VarlenAttention,
        capture: Capture,
        max_tokens: int,
        max_segments: int = MAX_SEGMENTS,
        max_graphs: int = 256,
        adapter_slots: AdapterSlots | None = None,
    ) -> None:
        self._dit = dit
        self.adapter_slots = adapter_slots
        self._attention = attention
        self._capture = capture
        self._max_segments = max_segments
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[GraphKey, Replay] = OrderedDict()
        self._first: dict[GraphKey, list[ref[DeviceState]]] = {}
        self.record = GraphRecord("step")
        self.limit_to(max_tokens)

    def limit_to(self, max_tokens: int) -> None:
        """Serve packs up to this size from now on, with memory for no larger ones."""
        self._forget()
        self.max_tokens = max_tokens
        self._buckets = Buckets(max_tokens, self._max_segments)
        self._made: StepBuffers | None = self._new_buffers()

    @property
    def _buffers(self) -> StepBuffers:
        if self._made is None:
            self._made = self._new_buffers()
        return self._made

    def _new_buffers(self) -> StepBuffers:
        dit = self._dit
        device = dit.img_in.weight.device
        return StepBuffers.empty(dit.config, dit.dtype, device, self.max_tokens, self._max_segments)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def failures(self) -> dict[str, str]:
        """Packs that were to be captured and could not, in words, and why."""
        return self.record.failures

    def step(self, batch: ForwardBatch, pack: Pack, steps: int = 1) -> Tensor | None:
        """Step a pack, if there is a graph for it or it is time to capture one. Waits for nothing.

        Args:
            batch: the pack.
            pack: its layout.
            steps: 1, or all the steps of a lone sequence that has done none.

        Returns:
            int32 [branches], not 0 where tokens are no longer finite; the next step overwrites it.
            None if no graph serves: the sequences are then as they were.
        """
        found = self.launch(batch, pack, steps)
        if found is None:
            return None
        tokens, velocity, non_finite = found
        batch.advance(pack, tokens, velocity, steps)
        return non_finite

    def launch(
        self, batch: ForwardBatch, pack: Pack, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queue what `step` does, with the sequences as they were.

        Returns:
            Tokens and velocities [T, channels] after it, and a flag per branch; None if no graph
            serves.
        """
        key = self._key(batch, steps)
        why = self._why_eager(key, batch)
        if key is None or why is not None:
            self._count_eager(why, steps)
            return None
        replay = None
        if self._load(key, batch, pack):
            replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            self._count_eager(Eager.FAILED, steps)
            return None
        self._graphs.move_to_end(key)
        replay()
        self.record.replayed += 1
        buffers, n = self._buffers, pack.num_tokens
        tokens = buffers.tokens[:n].clone()
        keep = any(s.sequence.wants_previews for s in batch.states)
        velocity = buffers.velocity[:n].clone() if keep else tokens
        return tokens, velocity, buffers.non_finite[: len(batch.shapes)]

    def prepare(self, batch: ForwardBatch, pack: Pack, steps: int = 1) -> bool:
        """Capture the graph for packs like this one now, if there is none; the pack stays as it is.

        Returns:
            Whether there is one.
        """
        key = self._key(batch, steps)
        if key is None or not self._knows_adapters(batch) or str(key) in self.failures:
            return False
        if key not in self._graphs and self._load(key, batch, pack):
            self._add(key)
        return key in self._graphs

    @torch.inference_mode()
    def prime(self) -> bool:
        """Capture the largest graph: before all others, which then fit into its memory. A pool that
        meets rising sizes cannot use the smaller pieces again.

        Returns:
            Whether it could be captured.
        """
        key = self._buckets.key([self.max_tokens])
        assert key is not None
        if key not in self._graphs and str(key) not in self.failures:
            self._buffers.cu_seqlens[1 : key.segments + 1].fill_(key.tokens)
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs, their buffers and the adapters' slots: the weights move, and with them
        what graphs read, or the memory is needed elsewhere.
        """
        self._forget()
        if self.adapter_slots is not None:
            self.adapter_slots.release()

    def _forget(self) -> None:
        """The same, with adapters kept in their slots."""
        self._graphs.clear()
        self._made = None
        self.record.memory_freed()

    def forward(self, key: GraphKey) -> None:
        """What a graph does, on what lies in the buffers."""
        buffers, pack = self._buffers, self._buffers.pack(key)
        deltas = self._deltas(key, pack)
        for number in range(key.steps):
            # One step reads a row for each of its branches; of several, each reads its own one row.
            rows = slice(number, number + 1) if key.steps > 1 else slice(0, key.segments)
            modulation = buffers.modulation.rows(rows.start, rows.stop)
            tokens = buffers.tokens[: key.tokens]
            self._dit.operations.euler_step(
                tokens,
                self._dit(
                    tokens,
                    buffers.context[: key.tokens],
                    pack,
                    modulation,
                    self._attention,
                    deltas,
                ),
                pack.rows.index,
                pack.uncond_index,
                buffers.scalars[0, rows],
                buffers.scalars[1, rows],
                buffers.velocity[: key.tokens],
                buffers.non_finite[: 1 if key.steps > 1 else key.segments],
            )

    def _key(self, batch: ForwardBatch, steps: int) -> GraphKey | None:
        return self._buckets.key([s.tokens for s in batch.shapes], steps, batch.has_adapters)

    def _knows_adapters(self, batch: ForwardBatch) -> bool:
        """Whether slots have room for a pack's adapters, where it has any."""
        slots = self.adapter_slots
        return not batch.has_adapters or (slots is not None and slots.fit(batch.adapters))

    def _load(self, key: GraphKey, batch: ForwardBatch, pack: Pack) -> bool:
        """Copy a pack into the buffers, and its adapters into slots.

        Returns:
            Whether there was memory for slots: they were given back in between.
        """
        placed: Mapping[str, int] = {}
        if key.adapters:
            assert self.adapter_slots is not None
            try:
                placed = self.adapter_slots.place(batch.adapters)
            except torch.OutOfMemoryError as error:
                self.record.failed(str(key), error)
                return False
        self._buffers.load(key, batch, pack, placed)
        return True

    def _deltas(self, key: GraphKey, pack: Pack) -> SlotDeltas | None:
        """What the adapters of the buffers add. The padding counts as tokens of the first row, here
        as elsewhere.
        """
        if not key.adapters:
            return None
        assert self.adapter_slots is not None
        buffers, rows = self._buffers, slice(0, key.segments)
        return SlotDeltas(
            self.adapter_slots,
            self._dit.operations,
            pack.rows.index,
            buffers.slots[rows],
            buffers.scales[rows],
        )

    def _why_eager(self, key: GraphKey | None, batch: ForwardBatch) -> Eager | None:
        """Why not to replay or capture; notes who has come."""
        if not self._knows_adapters(batch):
            return Eager.ADAPTERS
        if key is None:
            return Eager.TOO_LARGE
        if key in self._graphs:
            return None
        if str(key) in self.failures:
            return Eager.FAILED
        first = self._first.setdefault(key, [ref(state) for state in batch.states])
        now = {id(state) for state in batch.states}
        return Eager.FIRST_USE if any(id(state()) in now for state in first) else None

    def _count_eager(self, why: Eager | None, steps: int) -> None:
        # A schedule that is not replayed as a whole may be step by step: those are counted.
        if why is not None and steps == 1:
            self.record.eager[why] += 1

    def _steps(self) -> int:
        """Steps in all graphs: one of a whole schedule takes the memory of that many."""
        return sum(key.steps for key in self._graphs)

    def _add(self, key: GraphKey) -> Replay | None:
        start = time.perf_counter()
        try:
            # The capture's warm-up steps them, and the pack is to be stepped once.
            before = self._buffers.tokens[: key.tokens].clone()
            replay = self._capture(lambda: self.forward(key))
            self._buffers.tokens[: key.tokens].copy_(before)
        except Exception as error:
            # Out of memory, or an attention kernel or a library that cannot be captured. The pack
            # runs without; others may still be captured.
            self.record.failed(str(key), error)
            return None
        while self._graphs and self._steps() + key.steps > self._max_graphs:
            self._graphs.popitem(last=False)
        self._graphs[key] = replay
        logger.debug("krea2-srt: captured %s in %.2f s", key, time.perf_counter() - start)
        return replay


# Text encoding: from token ids to contexts, at a few lengths and numbers of prompts.


MAX_PROMPTS = 4
"""Most prompts of a graph; more keep the device busy for longer than they take to launch."""

MAX_PROMPT_LENGTH = 576
"""Most tokens of a prompt in a graph; the template and the longest prompt are 551."""

PROMPT_LENGTH_STEP = 32

MAX_PROMPT_TOKENS = MAX_PROMPTS * (MAX_PROMPT_LENGTH - PREFIX_TOKENS)
"""Context tokens of the largest graph."""

Forward = Callable[[Tensor, Tensor, Segments], Tensor]


class TextKey(NamedTuple):
    """What a graph is captured for: prompts, and tokens of each with its template."""

    rows: int
    length: int

    def __str__(self) -> str:
        return f"up to {self.rows} prompts of up to {self.length} tokens"

    @property
    def longest(self) -> int:
        """Context tokens of a prompt, at most."""
        return self.length - PREFIX_TOKENS

    @property
    def kept(self) -> int:
        """Context tokens of all prompts, with padding."""
        return self.rows * self.longest


class TextGraphs:
    """Encodes prompts on graphs where their padded size has come before: a capture takes as long
    as some prompts.

    Args:
        forward: see `PromptEncoder.forward`; must read ``cu_seqlens`` of the segments alone.
        width: of a context.
        dtype: of a context.
        device: where all run.
        capture: how graphs are captured.

    Attributes:
        record: what they have done.
    """

    def __init__(
        self,
        forward: Forward,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._forward = forward
        self._capture = capture
        # Shared by all graphs.
        self._ids = torch.zeros(MAX_PROMPTS * MAX_PROMPT_LENGTH, dtype=torch.int64, device=device)
        self._kept = torch.zeros(MAX_PROMPT_TOKENS, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(2 * MAX_PROMPTS + 1, dtype=torch.int32, device=device)
        self._contexts = torch.zeros(MAX_PROMPT_TOKENS, width, dtype=dtype, device=device)
        self._graphs: dict[TextKey, Replay] = {}
        self._seen: set[TextKey] = set()
        self.record = GraphRecord("text encoder")

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def failures(self) -> dict[str, str]:
        """Sizes that were to be captured and could not, in words, and why."""
        return self.record.failures

    def encode(self, ids: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Encode prompts, if there is a graph for them or it is time to capture one.

        Args:
            ids: of each prompt with its template.

        Returns:
            The context of each; None if no graph serves.
        """
        rows, length = len(ids), max(map(len, ids))
        key = TextKey(
            1 << (rows - 1).bit_length(), -(-length // PROMPT_LENGTH_STEP) * PROMPT_LENGTH_STEP
        )
        why = self._why_eager(key)
        if why is not None:
            self.record.eager[why] += 1
            return None
        self._load(key, ids)
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            self.record.eager[Eager.FAILED] += 1
            return None
        replay()
        self.record.replayed += 1
        ends = [0, *accumulate(len(some) - PREFIX_TOKENS for some in ids)]
        return [self._contexts[start:end].clone() for start, end in pairwise(ends)]

    @torch.inference_mode()
    def prepare(self, rows: int, length: int) -> bool:
        """Capture the graph for prompts of up to this size now; whether there is one."""
        key = TextKey(rows, length)
        if key not in self._graphs and str(key) not in self.failures:
            self._load(key, [[0] * length] * rows)
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move."""
        self._graphs.clear()
        self.record.memory_freed()

    def forward(self, key: TextKey) -> None:
        """What a graph does, on what lies in the buffers."""
        ids = self._ids[: key.rows * key.length].view(key)
        prompts = Segments(self._cu_seqlens[: 2 * key.rows + 1], (), key.longest)
        contexts = self._forward(ids, self._kept[: key.kept], prompts)
        self._contexts[: key.kept].copy_(contexts)

    def _load(self, key: TextKey, ids: Sequence[Sequence[int]]) -> None:
        """Copy prompts in, padded to the key's size."""
        kept = kept_tokens(ids, key.length)
        padding = key.kept - len(kept)
        # Padding is any token, again and again, in segments that are no longer than prompts may be.
        # Of these, the key has room for as many as it has prompts; the rest are empty.
        lengths = [len(some) - PREFIX_TOKENS for some in ids]
        while padding > 0:
            lengths.append(min(padding, key.longest))
            padding -= lengths[-1]
        lengths += [0] * (2 * key.rows - len(lengths))
        copy_to(self._ids[: key.rows * key.length].view(key), padded(ids, *key))
        kept += [0] * (key.kept - len(kept))
        copy_to(self._kept[: key.kept], torch.tensor(kept))
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        copy_to(self._cu_seqlens[: 2 * key.rows + 1], offsets)

    def _why_eager(self, key: TextKey) -> Eager | None:
        """Why not to replay or capture; notes what has come."""
        if key.rows > MAX_PROMPTS or key.length > MAX_PROMPT_LENGTH:
            return Eager.TOO_LARGE
        seen = key in self._seen
        self._seen.add(key)
        if key in self._graphs:
            return None
        if str(key) in self.failures:
            return Eager.FAILED
        return None if seen else Eager.FIRST_USE

    def _add(self, key: TextKey) -> Replay | None:
        try:
            replay = self._capture(lambda: self.forward(key))
        except Exception as error:
            # Prompts of this size are encoded without; others may still be captured.
            self.record.failed(str(key), error)
            return None
        self._graphs[key] = replay
        return replay
