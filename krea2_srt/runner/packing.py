"""Packing: which sequences go together, where their tokens lie, and their RoPE coordinates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.pack import Pack, Segments, Span
from krea2_srt.model.rope import rope_rotations
from krea2_srt.runner.byte_cache import ByteCache


@dataclass(frozen=True)
class SequenceShape:
    """What a pack must know of a sequence.

    Attributes:
        text_tokens: of its prompt.
        rows, columns: of image tokens.
        guided: the next sequence of the pack is the same image with its negative prompt.
    """

    text_tokens: int
    rows: int
    columns: int
    guided: bool = False

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


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
