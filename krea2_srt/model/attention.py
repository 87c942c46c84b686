"""The shape of an attention implementation, and the one that runs anywhere."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_srt.kernels.operations import Operations
from krea2_srt.kernels.quantize import TokenFormat, Tokens
from krea2_srt.model.pack import Segments


class VarlenAttention(Protocol):
    """Bidirectional attention within each segment, with grouped key/value heads."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """Attend.

        Args:
            q: [T, heads, head_dim].
            k, v: [T, kv_heads, head_dim]; heads is a multiple of kv_heads.
            segments: which of the T tokens see each other.

        Returns:
            [T, heads, head_dim].
        """


class VarlenGatedAttention(Protocol):
    """`VarlenAttention`, times the sigmoid of a gate."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segments: Segments) -> Tensor:
        """Attend, with gate [T, heads * head_dim]."""


@dataclass(frozen=True)
class FusedGateAttention:
    """A `VarlenAttention` that can also gate what it writes.

    Attributes:
        attend: without a gate.
        attend_gated: with one.
    """

    attend: VarlenAttention
    attend_gated: VarlenGatedAttention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return self.attend(q, k, v, segments)


def attend_and_gate(
    attention: VarlenAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    segments: Segments,
    operations: Operations,
    format: TokenFormat | None = None,
) -> Tokens:
    """What the attention's out projection reads, by one kernel where attention gates by itself.

    Not in 8 bits: a token's scale is known only when all its heads are there, so the result would
    be written and read once more to be quantised: as many bytes as gate and quantisation in one.

    Args:
        attention: how to attend.
        q, k, v, segments: see `VarlenAttention`.
        gate: [T, heads * head_dim].
        operations: whose sigmoid gate it is otherwise.
        format: quantise the result.

    Returns:
        [T, heads * head_dim].
    """
    if format is None and isinstance(attention, FusedGateAttention):
        return attention.attend_gated(q, k, v, gate, segments).flatten(-2)
    return operations.sigmoid_gate(attention(q, k, v, segments).flatten(-2), gate, format)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` as one scaled-dot-product call per segment, on any device."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        # Not enable_gqa: of torch's CUDA kernels only flash takes it, so float32 and older GPUs
        # would get the kernel that writes the whole score matrix.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = torch.empty_like(q)
    for start, end in segments.spans:
        if start == end:
            continue
        q_, k_, v_ = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        segment = F.scaled_dot_product_attention(q_, k_, v_)
        out[start:end] = segment.squeeze(0).transpose(0, 1)
    return out
