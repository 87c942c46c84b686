"""The Krea 2 DiT: one stream of text and image tokens, for a pack of sequences."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.kernels.operations import TORCH, Operations
from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.deltas import Deltas
from krea2_srt.model.host_blocks import BlockWeights, HostBlock, without_memory
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.layers import (
    GatedAttention,
    Linear,
    LinearFactory,
    RMSNorm,
    SwiGLU,
    parameter,
)
from krea2_srt.model.modulation import Modulation, timestep_embedding
from krea2_srt.model.pack import Pack, Segments
from krea2_srt.model.quantization import Quantization, block_linears
from krea2_srt.model.text_fusion import TextFusion
from krea2_srt.model.weights import WeightSlot

_ON_DEVICE = nullcontext()


class DiTBlock(nn.Module):
    """Gated attention and SwiGLU, both modulated by the timestep: the weights of one block."""

    def __init__(self, config: Krea2Config, linears: LinearFactory) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1 = RMSNorm(size, config.norm_eps)
        self.norm2 = RMSNorm(size, config.norm_eps)
        self.scale_shift_table = parameter(6, size, dtype=torch.float32)
        self.attn = GatedAttention(
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.attention_head_dim,
            config.norm_eps,
            linears,
        )
        self.ff = SwiGLU(size, config.intermediate_size, linears)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return self.attn.qkvg, self.attn.out, self.ff.gate_up, self.ff.down

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{prefix}scale_shift_table", WeightSlot(self.scale_shift_table)
        yield from self.norm1.weight_map(f"{prefix}norm1.")
        yield from self.norm2.weight_map(f"{prefix}norm2.")
        yield from self.attn.weight_map(f"{prefix}attn.")
        yield from self.ff.weight_map(f"{prefix}ff.")


class Krea2DiT(nn.Module):
    """Velocity of every sequence of a pack, each at its own step.

    Use: `fuse_text` once per prompt, `modulation` once per schedule, then `forward` per step.
    `embed`, `run_blocks` and `finish` are its three parts, for callers that run a step in slices.

    Args:
        config: the architecture.
        dtype: compute dtype of matrices and of the token stream.
        quantization: of the blocks' matrices; None leaves them in the compute dtype.
        rotations: of matrices that a checkpoint has in int8 already; see `block_linears`.
        on_host: numbers of blocks whose matrices are in host memory, pinned where the model is on
            a GPU.

    Attributes:
        operations: what runs between the matrix multiplications of the blocks.
        host_blocks: those on the host, by number, in order.
        block_weights: brings these to the device; None where there are none, or none is to run.
    """

    operations: Operations = TORCH
    block_weights: BlockWeights | None = None

    def __init__(
        self,
        config: Krea2Config,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        rotations: Mapping[str, int] = MappingProxyType({}),
        on_host: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.quantization = quantization
        if quantization is not None:
            quantization.check(config.num_layers)
        self.dtype = dtype
        hidden = config.hidden_size
        self.img_in = Linear(config.in_channels, {"img_in": hidden}, bias=True, dtype=dtype)
        self.time_linear_1 = Linear(
            config.timestep_embed_dim, {"linear_1": hidden}, bias=True, dtype=dtype
        )
        self.time_linear_2 = Linear(hidden, {"linear_2": hidden}, bias=True, dtype=dtype)
        self.time_mod_proj = Linear(hidden, {"time_mod_proj": 6 * hidden}, bias=True, dtype=dtype)
        self.text_fusion = TextFusion(config, dtype)
        self.blocks = nn.ModuleList()
        self.host_blocks: dict[int, HostBlock] = {}
        for number in range(config.num_layers):
            linears = block_linears(quantization, number, dtype, rotations)
            if number not in on_host:
                self.blocks.append(DiTBlock(config, linears))
                continue
            block = DiTBlock(config, without_memory(linears))
            pinned = self.img_in.weight.device.type == "cuda"
            self.host_blocks[number] = HostBlock(block.linears, pinned)
            self.blocks.append(block)
        self.final_norm = RMSNorm(hidden, config.norm_eps)
        self.final_table = parameter(2, hidden, dtype=torch.float32)
        self.final_linear = Linear(hidden, {"linear": config.in_channels}, bias=True, dtype=dtype)

    def modulation(self, timesteps: Tensor, deltas: Deltas | None = None) -> Modulation:
        """Modulation of all blocks for the timesteps of one schedule.

        Args:
            timesteps: [n] in [0, 1]. They are rounded to the compute dtype first, as the original
                sampler and Diffusers do.
            deltas: of the matrices, the same for all rows.

        Returns:
            `Modulation` with n rows, on the model's device.
        """
        config = self.config
        timesteps = to_device(timesteps.to(self.dtype), self.img_in.weight.device)
        embedding = timestep_embedding(timesteps, config.timestep_embed_dim).to(self.dtype)
        time = F.gelu(self.time_linear_1(embedding, deltas), approximate="tanh")
        time = self.time_linear_2(time, deltas)
        shared = self.time_mod_proj(F.gelu(time, approximate="tanh"), deltas).float()
        shared = shared.unflatten(-1, (6, -1))  # [n, 6, hidden]
        scales, shifts, gates = [], [], []
        for block in self.blocks:
            vectors = shared + block.scale_shift_table
            norms = torch.stack([block.norm1.scale, block.norm2.scale])
            scales.append(norms * (1 + vectors[:, [0, 3]]))
            shifts.append(vectors[:, [1, 4]])
            gates.append(vectors[:, [2, 5]].to(self.dtype))
        final = time.float()[:, None] + self.final_table  # [n, 2, hidden]
        return Modulation(
            torch.stack(scales, dim=1),
            torch.stack(shifts, dim=1),
            torch.stack(gates, dim=1),
            self.final_norm.scale * (1 + final[:, 0]),
            final[:, 1].contiguous(),
        )

    def fuse_text(
        self,
        hidden_states: Tensor,
        prompts: Segments,
        attention: VarlenAttention = sdpa_attention,
        deltas: Deltas | None = None,
    ) -> Tensor:
        """Context tokens of one or several prompts; see `TextFusion.forward`."""
        return self.text_fusion(hidden_states.to(self.dtype), prompts, attention, deltas)

    def embed(
        self, tokens: Tensor, context: Tensor, pack: Pack, deltas: Deltas | None = None
    ) -> Tensor:
        """The token stream before the first block.

        Args:
            tokens: [T, in_channels], noisy patches (c ph pw) at the image tokens.
            context: [T, hidden] from `fuse_text` at the text tokens.
            pack: the layout.
            deltas: of the matrices, by the pack's tokens.

        Returns:
            [T, hidden] in the compute dtype.
        """
        image = self.img_in(tokens.to(self.dtype), deltas)
        return torch.where(pack.is_text, context.to(self.dtype), image)

    def run_blocks(
        self,
        x: Tensor,
        pack: Pack,
        modulation: Modulation,
        blocks: range,
        attention: VarlenAttention = sdpa_attention,
        deltas: Deltas | None = None,
    ) -> Tensor:
        """Run some consecutive blocks on the token stream, in place.

        Args:
            x: [T, hidden] from `embed` or an earlier slice; overwritten.
            pack: the layout.
            modulation: one row per sequence.
            blocks: which blocks.
            attention: how to attend.
            deltas: of the matrices, by the pack's tokens.

        Returns:
            x.
        """
        do, m, rows, eps = self.operations, modulation, pack.rows, self.config.norm_eps
        scale, shift = m.scales[:, blocks.start, 0], m.shifts[:, blocks.start, 0]
        format = self.blocks[blocks.start].attn.qkvg.format
        h = do.norm_scale_shift(x, scale, shift, rows, eps, format)
        for i in blocks:
            with self.on_device(i):
                block = self.blocks[i]
                scale, shift, format = m.scales[:, i, 1], m.shifts[:, i, 1], block.ff.gate_up.format
                # What a branch returns gets no name here: it would live on while the next one runs,
                # which is when memory is fullest.
                h = do.add_gated_norm(
                    x,
                    m.gates[:, i, 0],
                    block.attn(h, attention, pack.segments, pack.rope, do, deltas),
                    scale,
                    shift,
                    rows,
                    eps,
                    format,
                )
                if i + 1 == blocks.stop:
                    return do.add_gated(x, m.gates[:, i, 1], block.ff(h, do, deltas), rows)
                scale, shift = m.scales[:, i + 1, 0], m.shifts[:, i + 1, 0]
                format = self.blocks[i + 1].attn.qkvg.format
                h = do.add_gated_norm(
                    x, m.gates[:, i, 1], block.ff(h, do, deltas), scale, shift, rows, eps, format
                )
        return x

    def on_device(self, block: int) -> AbstractContextManager[None]:
        """Within it a block's matrices are on the device; see `BlockWeights.on_device`."""
        weights = self.block_weights
        return _ON_DEVICE if weights is None else weights.on_device(block)

    def finish(
        self, x: Tensor, pack: Pack, modulation: Modulation, deltas: Deltas | None = None
    ) -> Tensor:
        """Velocity of the image tokens: [T, hidden] -> [T, in_channels].

        What it gives for text tokens means nothing.
        """
        scale, shift = modulation.final_scale, modulation.final_shift
        weight, bias = self.final_linear.weight, self.final_linear.bias
        do, eps = self.operations, self.config.norm_eps
        out = do.final_layer(x, scale, shift, pack.rows, eps, weight, bias)
        if deltas is not None and deltas.touch(self.final_linear):
            normed = do.norm_scale_shift(x, scale, shift, pack.rows, eps, None)
            deltas.add(self.final_linear, normed, out)
        return out

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        pack: Pack,
        modulation: Modulation,
        attention: VarlenAttention = sdpa_attention,
        deltas: Deltas | None = None,
    ) -> Tensor:
        """Velocity of a pack.

        Args:
            tokens, context, pack: see `embed`.
            modulation: one row per sequence, its current step's.
            attention: how to attend.
            deltas: of the matrices, by the pack's tokens.

        Returns:
            [T, in_channels] in the compute dtype; see `finish`.
        """
        x = self.embed(tokens, context, pack, deltas)
        x = self.run_blocks(x, pack, modulation, range(len(self.blocks)), attention, deltas)
        return self.finish(x, pack, modulation, deltas)

    def weight_map(self) -> dict[str, WeightSlot]:
        """Where each tensor of a Diffusers-layout checkpoint goes."""
        found = dict(self.img_in.weight_map(""))
        found |= dict(self.time_linear_1.weight_map("time_embed."))
        found |= dict(self.time_linear_2.weight_map("time_embed."))
        found |= dict(self.time_mod_proj.weight_map(""))
        found |= dict(self.text_fusion.weight_map())
        for i, block in enumerate(self.blocks):
            found |= dict(block.weight_map(f"transformer_blocks.{i}."))
        found["final_layer.scale_shift_table"] = WeightSlot(self.final_table)
        found |= dict(self.final_norm.weight_map("final_layer.norm."))
        found |= dict(self.final_linear.weight_map("final_layer."))
        return found
