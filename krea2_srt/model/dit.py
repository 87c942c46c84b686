"""The Krea 2 DiT: one stream of text and image tokens, for a pack of sequences."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.layers import GatedAttention, Linear, RMSNorm, SwiGLU, parameter
from krea2_srt.model.modulation import Modulation, timestep_embedding
from krea2_srt.model.pack import Pack, Segments, Span
from krea2_srt.model.text_fusion import TextFusion
from krea2_srt.model.weights import Target


def norm_scale_shift(
    x: Tensor, scale: Tensor, shift: Tensor, spans: Sequence[Span], eps: float
) -> Tensor:
    """RMSNorm, scale and shift of some spans of tokens, each with its row of scale and shift.

    Args:
        x: [T, hidden].
        scale, shift: float32 [spans, hidden].
        spans: (start, end) in T; other tokens are left out of the result.
        eps: of the norm.

    Returns:
        [sum of spans, hidden] in x's dtype; computed in float32.
    """
    pieces = [
        F.rms_norm(x[start:end].float(), scale.shape[1:], scale[row], eps).add_(shift[row])
        for row, (start, end) in enumerate(spans)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor, spans: Sequence[Span]) -> Tensor:
    """``x + gate * branch`` in place, each span with its row of gate.

    Args:
        x, branch: [T, hidden].
        gate: [spans, hidden].
        spans: (start, end) in T.
    """
    for row, (start, end) in enumerate(spans):
        x[start:end].addcmul_(gate[row], branch[start:end])
    return x


class DiTBlock(nn.Module):
    """Gated attention and SwiGLU, both modulated by the timestep."""

    def __init__(self, config: Krea2Config, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.hidden_size
        self.eps = config.norm_eps
        self.norm1 = RMSNorm(size, config.norm_eps)
        self.norm2 = RMSNorm(size, config.norm_eps)
        self.scale_shift_table = parameter(6, size, dtype=torch.float32)
        self.attn = GatedAttention(
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.attention_head_dim,
            config.norm_eps,
            dtype,
        )
        self.ff = SwiGLU(size, config.intermediate_size, dtype)

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        gate: Tensor,
        pack: Pack,
        attention: VarlenAttention,
    ) -> Tensor:
        """Run the block in place.

        Args:
            x: [T, hidden]; overwritten with the result.
            scale, shift: float32 [2, S, hidden], for the attention and the MLP branch.
            gate: [2, S, hidden].
            pack: whose tokens ``x`` are.
            attention: how to attend.
        """
        spans = pack.segments.spans
        h = norm_scale_shift(x, scale[0], shift[0], spans, self.eps)
        x = add_gated(x, gate[0], self.attn(h, attention, pack.segments, pack.rope), spans)
        h = norm_scale_shift(x, scale[1], shift[1], spans, self.eps)
        return add_gated(x, gate[1], self.ff(h), spans)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield f"{prefix}scale_shift_table", Target(self.scale_shift_table)
        yield from self.norm1.targets(f"{prefix}norm1.")
        yield from self.norm2.targets(f"{prefix}norm2.")
        yield from self.attn.targets(f"{prefix}attn.")
        yield from self.ff.targets(f"{prefix}ff.")


class Krea2DiT(nn.Module):
    """Velocity of every sequence of a pack, each at its own step.

    Use: `fuse_text` once per prompt, `modulation` once per schedule, then `forward` per step.
    `embed`, `run_blocks` and `finish` are its three parts, for callers that run a step in slices.

    Args:
        config: the architecture.
        dtype: compute dtype of matrices and of the token stream.
    """

    def __init__(self, config: Krea2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        hidden = config.hidden_size
        self.img_in = Linear(config.in_channels, {"img_in": hidden}, bias=True, dtype=dtype)
        self.time_linear_1 = Linear(
            config.timestep_embed_dim, {"linear_1": hidden}, bias=True, dtype=dtype
        )
        self.time_linear_2 = Linear(hidden, {"linear_2": hidden}, bias=True, dtype=dtype)
        self.time_mod_proj = Linear(hidden, {"time_mod_proj": 6 * hidden}, bias=True, dtype=dtype)
        self.text_fusion = TextFusion(config, dtype)
        self.blocks = nn.ModuleList(DiTBlock(config, dtype) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(hidden, config.norm_eps)
        self.final_table = parameter(2, hidden, dtype=torch.float32)
        self.final_linear = Linear(hidden, {"linear": config.in_channels}, bias=True, dtype=dtype)

    def modulation(self, timesteps: Tensor) -> Modulation:
        """Modulation of all blocks for the timesteps of one schedule.

        Args:
            timesteps: [n] in [0, 1]. They are rounded to the compute dtype first, as the original
                sampler and Diffusers do.

        Returns:
            `Modulation` with n rows, on the model's device.
        """
        config = self.config
        timesteps = timesteps.to(self.img_in.weight.device, self.dtype)
        embedding = timestep_embedding(timesteps, config.timestep_embed_dim).to(self.dtype)
        time = self.time_linear_2(F.gelu(self.time_linear_1(embedding), approximate="tanh"))
        shared = self.time_mod_proj(F.gelu(time, approximate="tanh")).float()
        shared = shared.unflatten(-1, (6, -1))  # [n, 6, hidden]
        scales, shifts, gates = [], [], []
        for block in self.blocks:
            vectors = (shared + block.scale_shift_table).transpose(0, 1)  # [6, n, hidden]
            norms = torch.stack([block.norm1.scale, block.norm2.scale])[:, None]
            scales.append(norms * (1 + vectors[[0, 3]]))
            shifts.append(vectors[[1, 4]])
            gates.append(vectors[[2, 5]].to(self.dtype))
        final = time.float()[:, None] + self.final_table  # [n, 2, hidden]
        return Modulation(
            torch.stack(scales),
            torch.stack(shifts),
            torch.stack(gates),
            self.final_norm.scale * (1 + final[:, 0]),
            final[:, 1].contiguous(),
        )

    def fuse_text(
        self,
        taps: Tensor,
        prompts: Segments,
        attention: VarlenAttention = sdpa_attention,
    ) -> Tensor:
        """Context tokens of one or several prompts; see `TextFusion.forward`."""
        return self.text_fusion(taps.to(self.dtype), prompts, attention)

    def embed(self, image_tokens: Tensor, context: Tensor, pack: Pack) -> Tensor:
        """Lay text and image tokens out as the pack says.

        Args:
            image_tokens: [sum of image tokens, in_channels], sequence after sequence.
            context: [sum of text tokens, hidden], sequence after sequence.
            pack: the layout.

        Returns:
            [T, hidden] in the compute dtype.
        """
        image = self.img_in(image_tokens.to(self.dtype))
        pieces, text_at, image_at = [], 0, 0
        for text_span, image_span in zip(pack.text_spans, pack.image_spans, strict=True):
            text_len, image_len = text_span[1] - text_span[0], image_span[1] - image_span[0]
            pieces += [
                context[text_at : text_at + text_len].to(self.dtype),
                image[image_at : image_at + image_len],
            ]
            text_at, image_at = text_at + text_len, image_at + image_len
        return torch.cat(pieces)

    def run_blocks(
        self,
        x: Tensor,
        pack: Pack,
        modulation: Modulation,
        blocks: range,
        attention: VarlenAttention = sdpa_attention,
    ) -> Tensor:
        """Run some consecutive blocks on the token stream, in place.

        Args:
            x: [T, hidden] from `embed` or an earlier slice; overwritten.
            pack: the layout.
            modulation: one row per sequence.
            blocks: which blocks.
            attention: how to attend.
        """
        for i in blocks:
            m = modulation
            x = self.blocks[i](x, m.scales[i], m.shifts[i], m.gates[i], pack, attention)
        return x

    def finish(self, x: Tensor, pack: Pack, modulation: Modulation) -> Tensor:
        """Velocity of the image tokens: [T, hidden] -> [sum of image tokens, in_channels]."""
        scale, shift = modulation.final_scale, modulation.final_shift
        return self.final_linear(
            norm_scale_shift(x, scale, shift, pack.image_spans, self.config.norm_eps)
        )

    def forward(
        self,
        image_tokens: Tensor,
        context: Tensor,
        pack: Pack,
        modulation: Modulation,
        attention: VarlenAttention = sdpa_attention,
    ) -> Tensor:
        """Velocity of a pack.

        Args:
            image_tokens: [sum of image tokens, in_channels], noisy patches (c ph pw), sequence
                after sequence.
            context: [sum of text tokens, hidden] from `fuse_text`, sequence after sequence.
            pack: the layout.
            modulation: one row per sequence, its current step's.
            attention: how to attend.

        Returns:
            [sum of image tokens, in_channels] in the compute dtype.
        """
        x = self.embed(image_tokens, context, pack)
        x = self.run_blocks(x, pack, modulation, range(len(self.blocks)), attention)
        return self.finish(x, pack, modulation)

    def targets(self) -> dict[str, Target]:
        """Where each tensor of a Diffusers-layout checkpoint goes."""
        found = dict(self.img_in.targets(""))
        found |= dict(self.time_linear_1.targets("time_embed."))
        found |= dict(self.time_linear_2.targets("time_embed."))
        found |= dict(self.time_mod_proj.targets(""))
        found |= dict(self.text_fusion.targets())
        for i, block in enumerate(self.blocks):
            found |= dict(block.targets(f"transformer_blocks.{i}."))
        found["final_layer.scale_shift_table"] = Target(self.final_table)
        found |= dict(self.final_norm.targets("final_layer.norm."))
        found |= dict(self.final_linear.targets("final_layer."))
        return found
