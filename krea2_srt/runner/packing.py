"""From sequences that step together to one forward: layouts, what it reads, and one Euler step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.lora.beside import PackDeltas
from krea2_srt.lora.placed import PlacedAdapter
from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack, Segments, Span
from krea2_srt.model.rope import rope_rotations
from krea2_srt.request import MAX_ADAPTERS
from krea2_srt.runner.byte_cache import ByteCache
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.sequence_shape import SequenceShape

# Where the tokens of sequences that go together lie, and their RoPE coordinates.


def build_pack(
    shapes: Sequence[SequenceShape],
    config: Krea2Config,
    device: torch.device,
    rotations: Callable[[int, int], Tensor] | None = None,
) -> Pack:
    """Lay sequences out one after another, text before image, without padding.

    Args:
        shapes: one per sequence, in pack order; at least one.
        config: gives the RoPE axes.
        device: where the pack's tensors live.
        rotations: where to get the rotations of a grid of image tokens from, by rows and columns;
            by default they are computed.
    """
    segments = Segments.of((shape.tokens for shape in shapes), device)
    starts = [start for start, _ in segments.spans]
    text = [(at, at + shape.text_tokens) for at, shape in zip(starts, shapes, strict=True)]
    image = [(text_end, end) for (_, text_end), (_, end) in zip(text, segments.spans, strict=True)]
    num_tokens = segments.spans[-1][1]
    rope = torch.ones(
        (num_tokens, config.attention_head_dim // 2),
        dtype=torch.complex64,  # 1: text tokens sit at the origin, where nothing is rotated
        device=device,
    )
    for (start, end), shape in zip(image, shapes, strict=True):
        rope[start:end] = (
            rotations(shape.rows, shape.columns)
            if rotations is not None
            else image_rotations(shape.rows, shape.columns, config, device)
        )
    lengths = [shape.tokens for shape in shapes]
    index = torch.arange(len(shapes), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    spans = tuple((start, end, row) for row, (start, end) in enumerate(segments.spans))
    return Pack(
        segments,
        tuple(text),
        tuple(image),
        rope,
        SegmentIndex(to_device(index, device), spans),
        to_device(_is_text(text, num_tokens), device),
        to_device(_uncond_index(shapes, image, num_tokens), device),
    )


def _is_text(text: Sequence[Span], num_tokens: int) -> Tensor:
    found = torch.zeros(num_tokens, 1, dtype=torch.bool)
    for start, end in text:
        found[start:end] = True
    return found


def _uncond_index(
    shapes: Sequence[SequenceShape], image: Sequence[Span], num_tokens: int
) -> Tensor:
    found = torch.full((num_tokens,), -1, dtype=torch.int32)
    for number, (shape, (start, end)) in enumerate(zip(shapes, image, strict=True)):
        first = image[number + 1][0] if shape.guided else start
        found[start:end] = torch.arange(first, first + end - start, dtype=torch.int32)
    return found


def image_rotations(rows: int, columns: int, config: Krea2Config, device: torch.device) -> Tensor:
    """Rotations of a grid of image tokens at (0, row, column): complex64 [tokens, head_dim / 2]."""
    grid = torch.zeros(rows, columns, 3, dtype=torch.float64, device=device)
    grid[..., 1] = torch.arange(rows, dtype=torch.float64, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, dtype=torch.float64, device=device)
    return rope_rotations(grid.view(-1, 3), config.axes_dims_rope, config.rope_theta)


class PackCache:
    """Packs by their shapes: a pack's layout is the same at every step of the same sequences.

    Args:
        config: gives the RoPE axes.
        device: where packs live.
        max_bytes: of the packs, and again of the rotations by image size that they are built from.
            A token takes 512 bytes in each at the released head size.
    """

    def __init__(self, config: Krea2Config, device: torch.device, max_bytes: int) -> None:
        self._config = config
        self._device = device
        self._packs: ByteCache[tuple[SequenceShape, ...], Pack] = ByteCache(max_bytes)
        self._rotations: ByteCache[tuple[int, int], Tensor] = ByteCache(max_bytes)

    def get(self, shapes: tuple[SequenceShape, ...]) -> Pack:
        """The pack of these sequences, in this order."""
        return self._packs.get_or(
            shapes, lambda: build_pack(shapes, self._config, self._device, self._image_rotations)
        )

    def clear(self) -> None:
        """Forget all packs."""
        self._packs.clear()
        self._rotations.clear()

    def _image_rotations(self, rows: int, columns: int) -> Tensor:
        return self._rotations.get_or(
            (rows, columns), lambda: image_rotations(rows, columns, self._config, self._device)
        )


def split_by_tokens(tokens: Sequence[int], max_tokens: int) -> list[range]:
    """Cut a list of sequences into packs of at most ``max_tokens``, in order.

    Args:
        tokens: of each sequence.
        max_tokens: of a pack; a sequence with more goes alone.

    Returns:
        Ranges of indices into ``tokens``, none empty.
    """
    found: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(tokens):
        if index > start and total + size > max_tokens:
            found.append(range(start, index))
            start, total = index, 0
        total += size
    if start < len(tokens):
        found.append(range(start, len(tokens)))
    return found


# From sequences that step together to what their forward reads, and back.


@dataclass(frozen=True)
class ForwardBatch:
    """The forwards that a pack of sequences needs: one each, two under guidance.

    Attributes:
        states: the pack, each at its own step.
        shapes: of each branch.
        contexts: [text tokens, hidden] of each branch.
        owners: the sequence of each branch.
        first: the first branch of each sequence.
    """

    states: Sequence[DeviceState]
    shapes: tuple[SequenceShape, ...]
    contexts: tuple[Tensor, ...]
    owners: tuple[DeviceState, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, states: Sequence[DeviceState]) -> "ForwardBatch":
        """The branches of these sequences, in order; a negative prompt's follows its own."""
        shapes: list[SequenceShape] = []
        contexts: list[Tensor] = []
        owners: list[DeviceState] = []
        first: list[int] = []
        for s in states:
            first.append(len(shapes))
            shapes += s.shapes
            contexts += s.contexts
            owners += [s] * len(s.shapes)
        return cls(states, tuple(shapes), tuple(contexts), tuple(owners), tuple(first))

    @property
    def dt(self) -> list[float]:
        """The Euler step of each branch: the difference of its sigmas."""
        at = [(s.schedule.sigmas, s.sequence.step) for s in self.owners]
        return [sigmas[step + 1] - sigmas[step] for sigmas, step in at]

    @property
    def guidance(self) -> list[float]:
        """Guidance of each branch; 0 for a negative prompt's, whose velocity is left as it is."""
        pairs = zip(self.owners, self.shapes, strict=True)
        return [s.sequence.image.guidance if shape.guided else 0.0 for s, shape in pairs]

    @property
    def modulations(self) -> list[Modulation]:
        """One row for each branch, of its current step."""
        return [s.modulation.row(s.sequence.step) for s in self.owners]

    @property
    def has_adapters(self) -> bool:
        """Whether any of the sequences has one."""
        return any(s.adapters for s in self.states)

    @property
    def adapters(self) -> dict[str, PlacedAdapter]:
        """Those of all sequences, by digest."""
        return {adapter.digest: adapter for s in self.states for adapter, _ in s.adapters.uses}

    def adapter_rows(self, slots: Mapping[str, int]) -> tuple[list[list[int]], list[list[float]]]:
        """Slots and scales of each branch, `MAX_ADAPTERS` of either; a slot of -1 is none.

        Args:
            slots: by digest of the adapter in it.
        """
        numbers, scales = [], []
        for owner in self.owners:
            uses = owner.adapters.uses
            unused = MAX_ADAPTERS - len(uses)
            numbers.append([slots[adapter.digest] for adapter, _ in uses] + [-1] * unused)
            scales.append([scale for _, scale in uses] + [0.0] * unused)
        return numbers, scales

    def deltas(self, pack: Pack) -> PackDeltas | None:
        """What adapters add, to both branches under guidance; None if no sequence has any."""
        deltas = PackDeltas.of(pack.segments.spans, (s.adapters for s in self.owners))
        lead = self.owners[0]
        # Those of its last step, where the pack is as it was: they remember what they have joined.
        if deltas is None or lead.deltas is None or lead.deltas.runs != deltas.runs:
            lead.deltas = deltas
        return lead.deltas

    @property
    def tokens(self) -> list[Tensor]:
        """float32 [image tokens, channels] of each branch; all have begun."""
        return cast(list[Tensor], [s.tokens for s in self.owners])

    def advance(self, pack: Pack, tokens: Tensor, velocity: Tensor, steps: int = 1) -> None:
        """Give every sequence what it is after some steps. Cannot fail: all step, or none.

        Args:
            pack: the layout.
            tokens, velocity: float32 [T, channels], of which the sequences keep parts.
            steps: done.
        """
        for s, branch in zip(self.states, self.first, strict=True):
            start, end = pack.image_spans[branch]
            s.tokens = tokens[start:end]
            s.velocity = velocity[start:end] if s.sequence.wants_previews else None
            s.sequence.step += steps

    def non_finite(self, flags: list[int]) -> list[DeviceState]:
        """The sequences whose branch has a flag that is not 0."""
        return [s for s, branch in zip(self.states, self.first, strict=True) if flags[branch]]


# One step of a pack, run in slices of transformer blocks.


class PackForward:
    """A packed forward that can pause between blocks, holding its hidden states.

    The sequences change only in `finish`: a forward that fails or is dropped before leaves them
    as they were.

    Args:
        dit: the model.
        attention: how the pack attends.
        packs: where layouts are remembered.
        states: the pack, each at its own step.
    """

    def __init__(
        self,
        dit: Krea2DiT,
        attention: VarlenAttention,
        packs: PackCache,
        states: Sequence[DeviceState],
    ) -> None:
        self._dit = dit
        self._attention = attention
        self._batch = ForwardBatch.of(states)
        self._pack = packs.get(self._batch.shapes)
        self._modulation = Modulation.stack(self._batch.modulations)
        self._deltas = self._batch.deltas(self._pack)
        self._tokens = self._pack.place(self._pack.image_spans, self._batch.tokens)
        context = self._pack.place(self._pack.text_spans, self._batch.contexts)
        self._x = dit.embed(self._tokens, context, self._pack, self._deltas)
        # Here, and not between the blocks and the last layer, where the device would wait.
        self._scalars = to_device(
            torch.tensor([self._batch.dt, self._batch.guidance]), self._tokens.device
        )

    def run(self, blocks: range) -> None:
        """Run some blocks; those before them have run."""
        self._x = self._dit.run_blocks(
            self._x, self._pack, self._modulation, blocks, self._attention, self._deltas
        )

    def finish(self) -> Tensor:
        """Apply an Euler step to every sequence; all blocks have run. Waits for nothing.

        Returns:
            int32 [branches], not 0 where latents are no longer finite.
        """
        pack, batch, tokens = self._pack, self._batch, self._tokens
        velocity = torch.empty_like(tokens)
        non_finite = torch.empty(len(batch.shapes), dtype=torch.int32, device=tokens.device)
        self._dit.operations.euler_step(
            tokens,
            self._dit.finish(self._x, pack, self._modulation, self._deltas),
            pack.rows.index,
            pack.uncond_index,
            self._scalars[0],
            self._scalars[1],
            velocity,
            non_finite,
        )
        batch.advance(pack, tokens, velocity)
        return non_finite
