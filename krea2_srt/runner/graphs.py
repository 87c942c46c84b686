"""CUDA graphs: one captured forward per bucket, replayed on static buffers.

A graph reads and writes fixed places in memory, so every step copies what its pack is made of
into the buffers, replays, and copies the result out. The pack is padded to the graph's number of
tokens with a segment of its own, whose tokens nobody reads.
"""

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from weakref import ref

import torch
from torch import Tensor

from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import copy_to
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack, Segments
from krea2_srt.runner.buckets import Buckets, GraphKey
from krea2_srt.runner.capture import Capture, Replay
from krea2_srt.runner.forward_batch import ForwardBatch
from krea2_srt.runner.graph_record import Eager, GraphRecord
from krea2_srt.runner.sequence import DenoisingSequence

logger = logging.getLogger(__name__)

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

    def load(self, key: GraphKey, batch: ForwardBatch, pack: Pack) -> None:
        """Copy a pack in, padded to the key's tokens."""
        n = pack.num_tokens
        self._load_layout(key, pack)
        places = [self.tokens[start:end] for start, end in pack.image_spans]
        torch._foreach_copy_(places, batch.tokens)
        places = [self.context[start:end] for start, end in pack.text_spans]
        torch._foreach_copy_(places, list(batch.contexts))
        self.context[n : key.tokens].zero_()
        if key.steps > 1:
            (sequence,) = batch.sequences
            rows = [sequence.modulation.row(step) for step in range(key.steps)]
            sigmas = sequence.schedule.sigmas
            scalars = [[b - a for a, b in pairwise(sigmas)]]
            scalars.append([0.0] * key.steps)
        else:
            rows, scalars = batch.modulations, [batch.dt, batch.guidance]
        weight_map: list[Tensor] = []
        sources: list[Tensor] = []
        for at, row in enumerate(rows):
            weight_map += self.modulation.row(at).tensors
            sources += row.tensors
        torch._foreach_copy_(weight_map, sources)
        unused = [0.0] * (self.scalars.shape[1] - len(rows))
        copy_to(self.scalars, torch.tensor([some + unused for some in scalars]))

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

    Attributes:
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
    ) -> None:
        self._dit = dit
        self._attention = attention
        self._capture = capture
        self._max_segments = max_segments
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[GraphKey, Replay] = OrderedDict()
        self._first: dict[GraphKey, list[ref[DenoisingSequence]]] = {}
        self.record = GraphRecord("step")
        self.limit_to(max_tokens)

    def limit_to(self, max_tokens: int) -> None:
        """Serve packs up to this size from now on, with memory for no larger ones."""
        self.release()
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
        key = self._buckets.key([shape.tokens for shape in batch.shapes], steps)
        why = self._why_eager(key, batch)
        if key is None or why is not None:
            self._count_eager(why, steps)
            return None
        buffers = self._buffers
        buffers.load(key, batch, pack)
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            self._count_eager(Eager.FAILED, steps)
            return None
        self._graphs.move_to_end(key)
        replay()
        self.record.replayed += 1
        n = pack.num_tokens
        tokens = buffers.tokens[:n].clone()
        keep = any(s.keep_velocity for s in batch.sequences)
        velocity = buffers.velocity[:n].clone() if keep else tokens
        return tokens, velocity, buffers.non_finite[: len(batch.shapes)]

    def prepare(self, batch: ForwardBatch, pack: Pack, steps: int = 1) -> bool:
        """Capture the graph for packs like this one now, if there is none; the pack stays as it is.

        Returns:
            Whether there is one.
        """
        key = self._buckets.key([shape.tokens for shape in batch.shapes], steps)
        if key is None or str(key) in self.failures:
            return False
        if key not in self._graphs:
            self._buffers.load(key, batch, pack)
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
        """Forget all graphs and their buffers: the weights move, and with them what graphs read, or
        the memory is needed elsewhere.
        """
        self._graphs.clear()
        self._made = None
        self.record.memory_freed()

    def forward(self, key: GraphKey) -> None:
        """What a graph does, on what lies in the buffers."""
        buffers, pack = self._buffers, self._buffers.pack(key)
        for number in range(key.steps):
            # One step reads a row for each of its batch; of several, each reads its own one row.
            rows = slice(number, number + 1) if key.steps > 1 else slice(0, key.segments)
            modulation = buffers.modulation.rows(rows.start, rows.stop)
            tokens = buffers.tokens[: key.tokens]
            self._dit.operations.euler_step(
                tokens,
                self._dit(tokens, buffers.context[: key.tokens], pack, modulation, self._attention),
                pack.rows.index,
                pack.uncond_index,
                buffers.scalars[0, rows],
                buffers.scalars[1, rows],
                buffers.velocity[: key.tokens],
                buffers.non_finite[: 1 if key.steps > 1 else key.segments],
            )

    def _why_eager(self, key: GraphKey | None, batch: ForwardBatch) -> Eager | None:
        """Why not to replay or capture; notes who has come."""
        if key is None:
            return Eager.TOO_LARGE
        if key in self._graphs:
            return None
        if str(key) in self.failures:
            return Eager.FAILED
        first = self._first.setdefault(key, [ref(sequence) for sequence in batch.sequences])
        now = {id(sequence) for sequence in batch.sequences}
        return Eager.FIRST_USE if any(id(sequence()) in now for sequence in first) else None

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
