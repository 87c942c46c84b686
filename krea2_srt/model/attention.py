"""The shape of an attention implementation, and the one that runs anywhere."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Spans = Sequence[tuple[int, int]]


class VarlenAttention(Protocol):
    """Bidirectional attention within each sequence of a pack, with grouped key/value heads."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spans: Spans, max_seqlen: int
    ) -> Tensor:
        """Attend.

        Args:
            q: [T, heads, head_dim].
            k, v: [T, kv_heads, head_dim]; heads is a multiple of kv_heads.
            cu_seqlens: int32 [S + 1], offsets of the sequences in T.
            spans: the same offsets on the host, (start, end) per sequence.
            max_seqlen: tokens of the longest sequence.

        Returns:
            [T, heads, head_dim].
        """


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spans: Spans, max_seqlen: int
) -> Tensor:
    """`VarlenAttention` as one scaled-dot-product call per sequence, on any device."""
    del cu_seqlens, max_seqlen
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        # Expanding is a view-sized copy of the small key/value heads and keeps every SDPA
        # kernel eligible; enable_gqa falls back to the L x L math kernel on several devices.
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    out = torch.empty_like(q)
    for start, end in spans:
        segment = F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        )
        out[start:end] = segment.squeeze(0).transpose(0, 1)
    return out
