"""Packing: where the tokens of each sequence of a pack lie, and their RoPE coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.pack import Pack
from krea2_srt.model.rope import rope_rotations


@dataclass(frozen=True)
class SequenceShape:
    """What a pack must know of a sequence: text tokens, and rows and columns of image tokens."""

    text_tokens: int
    rows: int
    columns: int

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def build_pack(shapes: Sequence[SequenceShape], config: Krea2Config, device: torch.device) -> Pack:
    """Lay sequences out one after another, text before image, without padding.

    Args:
        shapes: one per sequence, in pack order; at least one.
        config: gives the RoPE axes.
        device: where the pack's tensors live.
    """
    if not shapes:
        raise ValueError("a pack needs at least one sequence")
    offsets = [0]
    text_spans, image_spans = [], []
    for shape in shapes:
        start = offsets[-1]
        text_spans.append((start, start + shape.text_tokens))
        image_spans.append((start + shape.text_tokens, start + shape.tokens))
        offsets.append(start + shape.tokens)
    rotations = [_rotations(shape, config, device) for shape in shapes]
    return Pack(
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
        spans=tuple(pairwise(offsets)),
        text_spans=tuple(text_spans),
        image_spans=tuple(image_spans),
        max_seqlen=max(shape.tokens for shape in shapes),
        rope=torch.cat(rotations),
    )


@lru_cache(maxsize=64)
def _rotations(shape: SequenceShape, config: Krea2Config, device: torch.device) -> Tensor:
    coordinates = torch.zeros(shape.tokens, 3, dtype=torch.float64, device=device)
    image = coordinates[shape.text_tokens :].view(shape.rows, shape.columns, 3)
    image[..., 1] = torch.arange(shape.rows, dtype=torch.float64, device=device)[:, None]
    image[..., 2] = torch.arange(shape.columns, dtype=torch.float64, device=device)
    return rope_rotations(coordinates, config.axes_dims_rope, config.rope_theta)


class PackCache:
    """Packs by their shapes: a pack's layout is the same at every step of the same sequences."""

    def __init__(self, config: Krea2Config, device: torch.device, size: int = 32) -> None:
        self._build = lru_cache(maxsize=size)(
            lambda shapes: build_pack(shapes, config, device),
        )

    def get(self, shapes: tuple[SequenceShape, ...]) -> Pack:
        return self._build(shapes)
