"""Building blocks shared by the DiT and its text fusion stage.

Matrix weights live in the compute dtype. Norm scales live in float32 and norms are computed in
float32, as in the released code.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.kernels.operations import TORCH, Operations
from krea2_srt.kernels.quantize import TokenFormat, Tokens
from krea2_srt.model.attention import VarlenAttention, attend_and_gate
from krea2_srt.model.deltas import Deltas
from krea2_srt.model.pack import Segments
from krea2_srt.model.weights import WeightSlot


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised, frozen parameter; checkpoints fill it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """A matrix multiplication whose rows may hold several checkpoint matrices (``parts``).

    Args:
        in_features: width of the input.
        parts: checkpoint name of each fused matrix -> its number of rows, in order.
        bias: whether each part has a bias.
        dtype: dtype of the weights, and of what it returns.

    Attributes:
        scale: float32 [rows, 1], of the rows of weights in 8 bits.
    """

    format: TokenFormat | None = None
    """How it reads its input; None as it is."""

    def __init__(
        self, in_features: int, parts: dict[str, int], *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = parts
        self.dtype = dtype
        rows = sum(parts.values())
        self.weight = parameter(rows, in_features, dtype=dtype)
        self.scale: Tensor | None = None
        self.bias = parameter(rows, dtype=dtype) if bias else None

    def forward(self, x: Tokens, deltas: Deltas | None = None) -> Tensor:
        """[..., in_features] -> [..., rows], with what is added to it."""
        out = self.product_with(x)
        if deltas is not None:
            deltas.add(self, x, out)
        return out

    def product_with(self, x: Tokens) -> Tensor:
        """The same without anything added."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        """Checkpoint names under ``prefix`` and where their tensors go."""
        start = 0
        for name, rows in self.parts.items():
            view = self.weight[start : start + rows]
            yield f"{prefix}{name}.weight", WeightSlot(view, rows_of=self.weight, start=start)
            if self.bias is not None:
                yield f"{prefix}{name}.bias", WeightSlot(self.bias[start : start + rows])
            start += rows


LinearFactory = Callable[[str, int, dict[str, int]], Linear]
"""Makes a matrix of a block from its name in it (``attn.out``), its input width and its parts."""


def plain_linears(dtype: torch.dtype) -> LinearFactory:
    """A factory of linear layers that are not quantised."""
    return lambda name, in_features, parts: Linear(in_features, parts, dtype=dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` in float32; the checkpoint stores ``scale - 1``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = parameter(size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; returns float32."""
        return F.rms_norm(x.float(), self.scale.shape, self.scale, self.eps)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield (
            f"{prefix}weight",
            WeightSlot(self.scale, transform=lambda stored: stored.float() + 1.0),
        )


class GatedAttention(nn.Module):
    """Grouped-query attention with QK RMSNorm, optional RoPE and a sigmoid output gate.

    q, k, v and the output gate come from one matrix multiplication.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        linears: LinearFactory,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        width, kv_width = heads * head_dim, kv_heads * head_dim
        self.widths = [width, kv_width, kv_width, width]
        names = ("to_q", "to_k", "to_v", "to_gate")
        self.qkvg = linears("attn.qkvg", size, dict(zip(names, self.widths, strict=True)))
        self.norm_q = RMSNorm(head_dim, eps)
        self.norm_k = RMSNorm(head_dim, eps)
        self.out = linears("attn.out", width, {"to_out.0": size})

    def project(
        self,
        x: Tokens,
        rope: Tensor | None = None,
        operations: Operations = TORCH,
        deltas: Deltas | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[T, size] -> q [T, heads, hd], k, v [T, kv_heads, hd], gate [T, heads * hd].

        All four are views of one matrix.
        """
        fused = self.qkvg(x, deltas)
        operations.qk_norm_rope(
            fused,
            self.norm_q.scale,
            self.norm_k.scale,
            rope,
            self.heads,
            self.kv_heads,
            self.norm_q.eps,
        )
        q, k, v, gate = fused.split(self.widths, dim=-1)
        head = (-1, self.head_dim)
        return q.unflatten(-1, head), k.unflatten(-1, head), v.unflatten(-1, head), gate

    def forward(
        self,
        x: Tokens,
        attention: VarlenAttention,
        segments: Segments,
        rope: Tensor | None = None,
        operations: Operations = TORCH,
        deltas: Deltas | None = None,
    ) -> Tensor:
        """Attend within each segment: x [T, size] -> [T, size]."""
        q, k, v, gate = self.project(x, rope, operations, deltas)
        return self.out(
            attend_and_gate(attention, q, k, v, gate, segments, operations, self.out.format), deltas
        )

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.qkvg.weight_map(prefix)
        yield from self.norm_q.weight_map(f"{prefix}norm_q.")
        yield from self.norm_k.weight_map(f"{prefix}norm_k.")
        yield from self.out.weight_map(prefix)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one matrix multiplication."""

    def __init__(self, size: int, hidden: int, linears: LinearFactory) -> None:
        super().__init__()
        self.gate_up = linears("ff.gate_up", size, {"gate": hidden, "up": hidden})
        self.down = linears("ff.down", hidden, {"down": size})

    def forward(
        self, x: Tokens, operations: Operations = TORCH, deltas: Deltas | None = None
    ) -> Tensor:
        """[T, size] -> [T, size]."""
        gate_up, format = self.gate_up, self.down.format
        # What is added has to be there before silu: the fused product keeps no such moment.
        added = deltas is not None and deltas.touch(gate_up)
        if added or len(x) < operations.fused_mlp_tokens:
            return self.down(operations.silu_mul(gate_up(x, deltas), format), deltas)
        weight, scale = gate_up.weight, gate_up.scale
        return self.down(operations.swiglu_product(x, weight, scale, gate_up.dtype, format), deltas)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.gate_up.weight_map(prefix)
        yield from self.down.weight_map(prefix)
