"""The baseline: the DiT as one would write it in plain PyTorch, and as Diffusers has it.

Separate matrices, modulation computed in every step, rotations of real numbers, torch's SDPA, one
image at a time. It shares the weights of a `Krea2DiT`, so that both fit on one GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.model.dit import DiTBlock, Krea2DiT
from krea2_srt.model.modulation import timestep_embedding


def _shared(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, T, heads, head_dim], cos and sin [T, head_dim] with each value twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


class PlainBlock(nn.Module):
    """One block, with the weights of ours."""

    def __init__(self, block: DiTBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attn = block.attn
        self.head_dim, self.eps = attn.head_dim, attn.norm_q.eps
        self.q, self.k, self.v, self.gate = (
            _shared(w) for w in attn.qkvg.weight.split(attn.widths)
        )
        self.out = _shared(attn.out.weight)
        self.mlp_gate, self.up = (_shared(w) for w in block.ff.gate_up.weight.chunk(2))
        self.down = _shared(block.ff.down.weight)
        self.table = _shared(block.scale_shift_table.to(dtype))
        self.norm1, self.norm2 = _shared(block.norm1.scale), _shared(block.norm2.scale)
        self.norm_q, self.norm_k = _shared(attn.norm_q.scale), _shared(attn.norm_k.scale)

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, hidden], time [1, 1, 6 * hidden] -> [1, T, hidden]."""
        modulation = (time.unflatten(-1, (6, -1)) + self.table).unbind(-2)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        h = (1 + scale1) * _norm(x, self.norm1, self.eps) + shift1
        q, k, v = (
            F.linear(h, w).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v)
        )
        q = _rotate(_norm(q, self.norm_q, self.eps), cos, sin)
        k = _rotate(_norm(k, self.norm_k, self.eps), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        out = out * torch.sigmoid(F.linear(h, self.gate))
        x = x + gate1 * F.linear(out, self.out)
        h = (1 + scale2) * _norm(x, self.norm2, self.eps) + shift2
        h = F.linear(F.silu(F.linear(h, self.mlp_gate)) * F.linear(h, self.up), self.down)
        return x + gate2 * h


class PlainDiT(nn.Module):
    """Velocity of one image.

    Args:
        dit: whose weights it shares.
    """

    def __init__(self, dit: Krea2DiT) -> None:
        super().__init__()
        self.dit = dit
        self.blocks = nn.ModuleList(PlainBlock(block, dit.dtype) for block in dit.blocks)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, context: Tensor, timestep: float, rope: Tensor) -> Tensor:
        """One forward.

        Args:
            tokens: [image tokens, channels].
            context: [text tokens, hidden].
            timestep: in [0, 1].
            rope: complex64 [T, head_dim / 2].

        Returns:
            [image tokens, channels].
        """
        dit = self.dit
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (rope.real, rope.imag))
        steps = torch.tensor([timestep], device=tokens.device).to(dit.dtype)
        embedded = timestep_embedding(steps, dit.config.timestep_embed_dim).to(dit.dtype)
        time = dit.time_linear_2(F.gelu(dit.time_linear_1(embedded), approximate="tanh"))
        shared = dit.time_mod_proj(F.gelu(time, approximate="tanh"))[:, None]
        x = torch.cat([context, dit.img_in(tokens.to(dit.dtype))])[None]
        for block in self.blocks:
            x = block(x, shared, cos, sin)
        scale, shift = (time[:, None] + dit.final_table.to(dit.dtype)).chunk(2, dim=1)
        x = (1 + scale) * _norm(x, dit.final_norm.scale, dit.config.norm_eps) + shift
        return dit.final_linear(x[0, len(context) :])
