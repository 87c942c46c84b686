"""Text fusion: from the encoder's selected hidden states to context tokens of the DiT.

Independent of the timestep, so it runs once per prompt, not once per step.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.deltas import Deltas
from krea2_srt.model.layers import GatedAttention, Linear, RMSNorm, SwiGLU, plain_linears
from krea2_srt.model.pack import Segments
from krea2_srt.model.weights import WeightSlot

TOKENS_AT_ONCE = 576
"""Whose hidden states are fused together. Those of a token are many rows, and for several long
prompts at a time they would take gigabytes; no prompt has more tokens than this."""


class TextFusionBlock(nn.Module):
    """Pre-norm transformer block without RoPE or time modulation."""

    def __init__(self, config: Krea2Config, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.text_hidden_dim
        self.norm1 = RMSNorm(size, config.norm_eps)
        self.norm2 = RMSNorm(size, config.norm_eps)
        self.attn = GatedAttention(
            size,
            config.text_num_attention_heads,
            config.text_num_key_value_heads,
            config.text_head_dim,
            config.norm_eps,
            plain_linears(dtype),
        )
        self.ff = SwiGLU(size, config.text_intermediate_size, plain_linears(dtype))

    def across_layers(self, x: Tensor, deltas: Deltas | None) -> Tensor:
        """Attend across the layers of each token on its own: [tokens, layers, size], same out."""
        # What is normalised gets no name: it would live on to the end, and take megabytes.
        q, k, v, gate = self.attn.project(self.norm1(x).to(x.dtype).flatten(0, 1), deltas=deltas)
        groups = self.attn.heads // self.attn.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        q, k, v = (t.unflatten(0, x.shape[:2]).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(-2)
        x = x + self.attn.out(out * torch.sigmoid(gate.unflatten(0, x.shape[:2])), deltas)
        return x + self.ff(self.norm2(x).to(x.dtype), deltas=deltas)

    def across_tokens(
        self, x: Tensor, attention: VarlenAttention, prompts: Segments, deltas: Deltas | None
    ) -> Tensor:
        """Attend across the tokens of each prompt: [tokens, size], same out."""
        x = x + self.attn(self.norm1(x).to(x.dtype), attention, prompts, deltas=deltas)
        return x + self.ff(self.norm2(x).to(x.dtype), deltas=deltas)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.norm1.weight_map(f"{prefix}norm1.")
        yield from self.norm2.weight_map(f"{prefix}norm2.")
        yield from self.attn.weight_map(f"{prefix}attn.")
        yield from self.ff.weight_map(f"{prefix}ff.")


class TextFusion(nn.Module):
    """Fuse each text token's hidden states, refine across tokens, project to the DiT's width."""

    def __init__(self, config: Krea2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.layerwise_blocks = nn.ModuleList(
            TextFusionBlock(config, dtype) for _ in range(config.num_layerwise_text_blocks)
        )
        self.projector = Linear(config.num_text_layers, {"projector": 1}, dtype=dtype)
        self.refiner_blocks = nn.ModuleList(
            TextFusionBlock(config, dtype) for _ in range(config.num_refiner_text_blocks)
        )
        hidden = config.hidden_size
        self.norm = RMSNorm(config.text_hidden_dim, config.norm_eps)
        self.linear_1 = Linear(config.text_hidden_dim, {"linear_1": hidden}, bias=True, dtype=dtype)
        self.linear_2 = Linear(hidden, {"linear_2": hidden}, bias=True, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        prompts: Segments,
        attention: VarlenAttention = sdpa_attention,
        deltas: Deltas | None = None,
    ) -> Tensor:
        """Fuse one or several prompts.

        Args:
            hidden_states: [tokens, num_text_layers, text_hidden_dim], prompts one after another.
            prompts: which tokens are one prompt's.
            attention: how to attend across the tokens of a prompt.
            deltas: of the matrices, the same for all rows.

        Returns:
            [tokens, hidden_size], the text tokens of the DiT.
        """
        some = [self._fuse_layers(part, deltas) for part in hidden_states.split(TOKENS_AT_ONCE)]
        x = some[0] if len(some) == 1 else torch.cat(some)
        for block in self.refiner_blocks:
            x = block.across_tokens(x, attention, prompts, deltas)
        x = self.linear_1(self.norm(x).to(x.dtype), deltas)
        return self.linear_2(F.gelu(x, approximate="tanh"), deltas)

    def _fuse_layers(self, x: Tensor, deltas: Deltas | None) -> Tensor:
        """[tokens, num_text_layers, text_hidden_dim] -> [tokens, text_hidden_dim]."""
        for block in self.layerwise_blocks:
            x = block.across_layers(x, deltas)
        return self.projector(x.transpose(1, 2), deltas).squeeze(-1)

    def weight_map(self) -> Iterator[tuple[str, WeightSlot]]:
        for kind in ("layerwise_blocks", "refiner_blocks"):
            for i, block in enumerate(getattr(self, kind)):
                yield from block.weight_map(f"text_fusion.{kind}.{i}.")
        yield from self.projector.weight_map("text_fusion.")
        yield from self.norm.weight_map("txt_in.norm.")
        yield from self.linear_1.weight_map("txt_in.")
        yield from self.linear_2.weight_map("txt_in.")
