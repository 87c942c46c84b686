"""The pack: several sequences' tokens in one forward, without padding."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.model.host_copies import to_device

Span = tuple[int, int]


@dataclass(frozen=True)
class Segments:
    """Which consecutive tokens belong together: what attention has to know.

    Attributes:
        cu_seqlens: int32 [S + 1], token offsets of S segments, on the model's device.
        spans: the same offsets on the host, (start, end) per segment.
        max_seqlen: tokens of the longest segment.
    """

    cu_seqlens: Tensor
    spans: tuple[Span, ...]
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> "Segments":
        """Segments of these lengths, one after another; at least one."""
        lengths = list(lengths)
        if not lengths:
            raise ValueError("at least one segment is needed")
        offsets = [0, *accumulate(lengths)]
        cu_seqlens = to_device(torch.tensor(offsets, dtype=torch.int32), device)
        return cls(cu_seqlens, tuple(pairwise(offsets)), max(lengths))


@dataclass(frozen=True)
class Pack:
    """Where each sequence's tokens lie. Holds nothing that changes from step to step.

    A sequence's tokens are its text tokens followed by its image tokens; sequences follow
    each other in order. ``T`` is the total of tokens, ``S`` the number of sequences. What goes
    into a forward and comes out of it has a row for each of the T tokens, whatever its kind.

    Attributes:
        segments: the S sequences.
        text_spans: (start, end) of each sequence's text tokens.
        image_spans: (start, end) of each sequence's image tokens.
        rope: complex64 [T, head_dim / 2], the rotation of each token's query and key pairs.
        rows: the sequence of each token.
        is_text: bool [T, 1].
        uncond_index: int32 [T], see `krea2_srt.kernels.euler`.
    """

    segments: Segments
    text_spans: tuple[Span, ...]
    image_spans: tuple[Span, ...]
    rope: Tensor
    rows: SegmentIndex
    is_text: Tensor
    uncond_index: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.rope)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (
            self.segments.cu_seqlens,
            self.rope,
            self.rows.index,
            self.is_text,
            self.uncond_index,
        )
        return sum(tensor.nbytes for tensor in tensors)

    def place(self, spans: Iterable[Span], pieces: Iterable[Tensor]) -> Tensor:
        """Lay pieces out at their spans, with zeros at all other tokens.

        Args:
            spans: ``text_spans`` or ``image_spans``.
            pieces: one per span, [tokens of it, width].

        Returns:
            [T, width] in the pieces' dtype.
        """
        pieces = list(pieces)
        placed = pieces[0].new_zeros(self.num_tokens, pieces[0].shape[1])
        for (start, end), piece in zip(spans, pieces, strict=True):
            placed[start:end] = piece
        return placed
