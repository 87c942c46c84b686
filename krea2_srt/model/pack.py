"""The pack: several sequences' tokens in one forward, without padding."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Where each sequence's tokens lie. Holds nothing that changes from step to step.

    A sequence's tokens are its text tokens followed by its image tokens; sequences follow
    each other in order. ``T`` is the total of tokens, ``S`` the number of sequences.

    Attributes:
        cu_seqlens: int32 [S + 1], token offsets of the sequences, on the model's device.
        spans: the same offsets on the host, as (start, end) per sequence.
        text_spans: (start, end) of each sequence's text tokens.
        image_spans: (start, end) of each sequence's image tokens.
        max_seqlen: tokens of the longest sequence.
        rope: complex64 [T, head_dim / 2], the rotation of each token's query and key pairs.
    """

    cu_seqlens: Tensor
    spans: tuple[tuple[int, int], ...]
    text_spans: tuple[tuple[int, int], ...]
    image_spans: tuple[tuple[int, int], ...]
    max_seqlen: int
    rope: Tensor

    @property
    def num_tokens(self) -> int:
        return self.spans[-1][1]
