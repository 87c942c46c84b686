"""Building blocks shared by the DiT and its text fusion stage.

Matrix weights live in the compute dtype. Norm scales live in float32 and norms are computed in
float32, as in the released code.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.pack import Segments
from krea2_srt.model.rope import apply_rope
from krea2_srt.model.weights import Target


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised, frozen parameter; checkpoints fill it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """A matrix multiplication whose rows may hold several checkpoint matrices (``parts``).

    Args:
        in_features: width of the input.
        parts: checkpoint name of each fused matrix -> its number of rows, in order.
        bias: whether each part has a bias.
        dtype: dtype of the weights.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = parts
        rows = sum(parts.values())
        self.weight = parameter(rows, in_features, dtype=dtype)
        self.bias = parameter(rows, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """Checkpoint names under ``prefix`` and where their tensors go."""
        start = 0
        for name, rows in self.parts.items():
            yield f"{prefix}{name}.weight", Target(self.weight[start : start + rows])
            if self.bias is not None:
                yield f"{prefix}{name}.bias", Target(self.bias[start : start + rows])
            start += rows


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` in float32; the checkpoint stores ``scale - 1``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = parameter(size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; returns float32."""
        return F.rms_norm(x.float(), self.scale.shape, self.scale, self.eps)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield f"{prefix}weight", Target(self.scale, transform=lambda stored: stored.float() + 1.0)


class GatedAttention(nn.Module):
    """Grouped-query attention with QK RMSNorm, optional RoPE and a sigmoid output gate.

    q, k, v and the output gate come from one matrix multiplication.
    """

    def __init__(
        self, size: int, heads: int, kv_heads: int, head_dim: int, eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        width, kv_width = heads * head_dim, kv_heads * head_dim
        self.widths = [width, kv_width, kv_width, width]
        names = ("to_q", "to_k", "to_v", "to_gate")
        self.qkvg = Linear(size, dict(zip(names, self.widths, strict=True)), dtype=dtype)
        self.norm_q = RMSNorm(head_dim, eps)
        self.norm_k = RMSNorm(head_dim, eps)
        self.out = Linear(width, {"to_out.0": size}, dtype=dtype)

    def project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[..., size] -> q [..., heads, hd], k, v [..., kv_heads, hd], gate [..., heads * hd]."""
        q, k, v, gate = self.qkvg(x).split(self.widths, dim=-1)
        q = self.norm_q(q.unflatten(-1, (self.heads, self.head_dim)))
        k = self.norm_k(k.unflatten(-1, (self.kv_heads, self.head_dim)))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        return q.to(x.dtype), k.to(x.dtype), v, gate

    def forward(
        self,
        x: Tensor,
        attention: VarlenAttention,
        segments: Segments,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Attend within each segment: x [T, size] -> [T, size]."""
        q, k, v, gate = self.project(x, rope)
        out = attention(q, k, v, segments)
        return self.out(out.flatten(-2) * torch.sigmoid(gate))

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.qkvg.targets(prefix)
        yield from self.norm_q.targets(f"{prefix}norm_q.")
        yield from self.norm_k.targets(f"{prefix}norm_k.")
        yield from self.out.targets(prefix)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one matrix multiplication."""

    def __init__(self, size: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(size, {"gate": hidden, "up": hidden}, dtype=dtype)
        self.down = Linear(hidden, {"down": size}, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.gate_up.targets(prefix)
        yield from self.down.targets(prefix)
