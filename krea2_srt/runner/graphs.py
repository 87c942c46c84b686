"""CUDA graphs: one captured forward per bucket, replayed on static buffers.

A graph reads and writes fixed places in memory, so every step copies what its pack is made of
into the buffers, replays, and copies the result out. The pack is padded to the graph's number of
tokens with a segment of its own, whose tokens nobody reads.
"""

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.kernels.token_rows import TokenRows
from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import copy_to
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack, Segments
from krea2_srt.runner.buckets import Buckets, GraphKey
from krea2_srt.runner.lanes import Lanes

logger = logging.getLogger(__name__)

USES_BEFORE_CAPTURE = 2
"""A capture takes as long as some steps: a bucket that comes once is not worth it."""

MAX_SEGMENTS = 64
"""Of a graph, its padding's own included; every one has a row of modulation in the buffers."""

Replay = Callable[[], None]


class Capture(Protocol):
    """Turns a function that queues work on static buffers into one that repeats it."""

    def __call__(self, function: Callable[[], object]) -> Replay: ...


class CudaCapture:
    """`Capture` as a CUDA graph. All graphs share one pool of memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Callable[[], object]) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Kernels are built and library handles made here: not possible under capture.
            function()
        torch.cuda.synchronize(self._device)
        if not self._alive:  # a pool that no graph holds any more cannot be captured into
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache first: a
        # pause while requests wait. The collector just must not free device objects in between.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # Thread-local: other threads may allocate pinned memory while this one captures.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        self._alive.add(graph)
        return graph.replay


@dataclass(frozen=True)
class StepBuffers:
    """What graphs read and write; a graph of fewer tokens uses the first of them.

    Attributes:
        tokens, velocity: float32 [T, channels], see `krea2_srt.kernels.euler`.
        context: [T, hidden] in the compute dtype.
        rope, row, is_text, partner: see `Pack`.
        cu_seqlens: int32 [segments + 1].
        scalars: float32 [2, rows], dt and guidance.
        modulation: of ``rows`` rows: one per lane of a pack, or one per step of a lone sequence.
        broken: int32 [rows].
    """

    tokens: Tensor
    velocity: Tensor
    context: Tensor
    rope: Tensor
    row: Tensor
    is_text: Tensor
    partner: Tensor
    cu_seqlens: Tensor
    scalars: Tensor
    modulation: Modulation
    broken: Tensor

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
            partner=zeros(max_tokens, dtype=torch.int32),
            cu_seqlens=zeros(max_rows + 1, dtype=torch.int32),
            scalars=zeros(2, max_rows),
            modulation=Modulation(
                zeros(*table),
                zeros(*table),
                zeros(*table, dtype=dtype),
                zeros(max_rows, hidden),
                zeros(max_rows, hidden),
            ),
            broken=zeros(max_rows, dtype=torch.int32),
        )

    def pack(self, key: GraphKey) -> Pack:
        """The pack that lies in the buffers, as far as the host knows it."""
        n = key.tokens
        return Pack(
            Segments(self.cu_seqlens[: key.segments + 1], (), key.longest),
            (),
            (),
            self.rope[:n],
            TokenRows(self.row[:n], None),
            self.is_text[:n],
            self.partner[:n],
        )

    def load(self, key: GraphKey, lanes: Lanes, pack: Pack) -> None:
        """Copy a pack in, padded to the key's tokens."""
        n = pack.num_tokens
        self._load_layout(key, pack)
        places = [self.tokens[start:end] for start, end in pack.image_spans]
        torch._foreach_copy_(places, lanes.tokens)
        places = [self.context[start:end] for start, end in pack.text_spans]
        torch._foreach_copy_(places, list(lanes.contexts))
        self.context[n : key.tokens].zero_()
        if key.steps > 1:
            (sequence,) = lanes.sequences
            rows, sigmas = [sequence.modulation], sequence.schedule.sigmas
            scalars = [[b - a for a, b in pairwise(sigmas)]]
            scalars.append([0.0] * key.steps)
        else:
            rows, scalars = lanes.modulations, [lanes.dt, lanes.guidance]
        at = 0
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for some in rows:
            count = len(some.final_scale)
            targets += self.modulation.rows(at, at + count).tensors
            sources += some.tensors
            at += count
        torch._foreach_copy_(targets, sources)
        unused = [0.0] * (self.scalars.shape[1] - at)
        copy_to(self.scalars, torch.tensor([some + unused for some in scalars]))

    def _load_layout(self, key: GraphKey, pack: Pack) -> None:
        n, count = pack.num_tokens, len(pack.segments.spans)
        self.rope[:n].copy_(pack.rope)
        self.row[:n].copy_(pack.rows.index)
        self.is_text[:n].copy_(pack.is_text)
        self.partner[:n].copy_(pack.partner)
        self.cu_seqlens[: count + 1].copy_(pack.segments.cu_seqlens)
        # The padding is text of the first row in a segment of its own, and takes no step. Segments
        # after it are empty.
        self.row[n : key.tokens].zero_()
        self.is_text[n : key.tokens].fill_(True)
        self.partner[n : key.tokens].fill_(-1)
        self.cu_seqlens[count + 1 : key.segments + 1].fill_(key.tokens)


class StepGraphs:
    """Steps packs by replaying graphs, captured when their bucket comes often enough.

    Args:
        dit: whose weights stay where they are; see `release`.
        attention: one that reads segment offsets on the device.
        capture: how graphs are captured.
        max_tokens: of a graph.
        max_segments: of a graph, its padding's own included.
        max_graphs: kept at a time, a whole schedule for as many as it has steps; the one used last
            longest ago makes room.
    """

    def __init__(
        self,
        dit: Krea2DiT,
        attention: VarlenAttention,
        capture: Capture,
        max_tokens: int,
        max_segments: int = MAX_SEGMENTS,
        max_graphs: int = 256,
    ) -> None:
        self._dit = dit
        self._attention = attention
        self._capture = capture
        self._buckets = Buckets(max_tokens, max_segments)
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[GraphKey, Replay] = OrderedDict()
        self._uses: dict[GraphKey, int] = {}
        self._failed: set[GraphKey] = set()
        self._buffers = StepBuffers.empty(
            dit.config, dit.dtype, dit.img_in.weight.device, max_tokens, max_segments
        )

    def __len__(self) -> int:
        return len(self._graphs)

    def step(self, lanes: Lanes, pack: Pack, steps: int = 1) -> list[int] | None:
        """Step a pack, if there is a graph for it or it is time to capture one.

        Args:
            lanes: the pack.
            pack: its layout.
            steps: 1, or all the steps of a lone sequence that has done none.

        Returns:
            A flag per lane, not 0 where tokens are no longer finite. None if no graph serves: the
            sequences are then as they were.
        """
        found = self.launch(lanes, pack, steps)
        if found is None:
            return None
        tokens, velocity, broken = found
        flags: list[int] = broken.tolist()
        lanes.advance(pack, tokens, velocity, steps)
        return flags

    def launch(
        self, lanes: Lanes, pack: Pack, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queue what `step` does, without waiting for the device.

        Returns:
            Tokens and velocities [T, channels] after it, and a flag per lane; None if no graph
            serves.
        """
        key = self._buckets.key([shape.tokens for shape in lanes.shapes], steps)
        if key is None or not self._worth_it(key):
            return None
        buffers = self._buffers
        buffers.load(key, lanes, pack)
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            return None
        self._graphs.move_to_end(key)
        replay()
        n = pack.num_tokens
        tokens = buffers.tokens[:n].clone()
        keep = any(s.keep_velocity for s in lanes.sequences)
        velocity = buffers.velocity[:n].clone() if keep else tokens
        return tokens, velocity, buffers.broken[: len(lanes.shapes)]

    def prepare(self, lanes: Lanes, pack: Pack, steps: int = 1) -> bool:
        """Capture the graph for packs like this one now, if there is none; the pack stays as it is.

        Returns:
            Whether there is one.
        """
        key = self._buckets.key([shape.tokens for shape in lanes.shapes], steps)
        if key is None or key in self._failed:
            return False
        if key not in self._graphs:
            self._buffers.load(key, lanes, pack)
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move, and with them what graphs read."""
        self._graphs.clear()

    def forward(self, key: GraphKey) -> None:
        """What a graph does, on what lies in the buffers."""
        buffers, pack = self._buffers, self._buffers.pack(key)
        for number in range(key.steps):
            # One step reads a row for each of its lanes; of several, each reads its own one row.
            rows = slice(number, number + 1) if key.steps > 1 else slice(0, key.segments)
            modulation = buffers.modulation.rows(rows.start, rows.stop)
            tokens = buffers.tokens[: key.tokens]
            self._dit.operations.euler_step(
                tokens,
                self._dit(tokens, buffers.context[: key.tokens], pack, modulation, self._attention),
                pack.rows.index,
                pack.partner,
                buffers.scalars[0, rows],
                buffers.scalars[1, rows],
                buffers.velocity[: key.tokens],
                buffers.broken[: 1 if key.steps > 1 else key.segments],
            )

    def _worth_it(self, key: GraphKey) -> bool:
        """Whether to replay or capture; counts uses."""
        if key in self._failed:
            return False
        if key in self._graphs:
            return True
        self._uses[key] = self._uses.get(key, 0) + 1
        return self._uses[key] >= USES_BEFORE_CAPTURE

    def _steps(self) -> int:
        """Of all graphs: one of a whole schedule takes the memory of as many as it has steps."""
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
            self._failed.add(key)
            logger.warning("krea2-srt: no CUDA graph for %s: %s", key, first_line(error))
            return None
        while self._graphs and self._steps() + key.steps > self._max_graphs:
            self._graphs.popitem(last=False)
        self._graphs[key] = replay
        logger.debug("krea2-srt: captured %s in %.2f s", key, time.perf_counter() - start)
        return replay
