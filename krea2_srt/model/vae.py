"""Latents to pixels: the decoder of AutoencoderKLQwenImage, reduced to two dimensions.

The released VAE is a causal video VAE. For one frame every causal 3-D convolution sees its own
frame in the last temporal slice of the kernel and zeros before it, so it equals the 2-D
convolution with that slice; the temporal upsamplers are not run at all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.kernels.channel_norm import channel_norm, channel_norm_triton
from krea2_srt.model.layers import parameter
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.model.weights import WeightSlot

_MAX_SCORES = {"cpu": 2**25, "cuda": 2**28}
"""Attention scores computed at a time, at most; a GPU is kept busy by few large products."""

BYTES_PER_SCORE = 8
"""On a GPU: of the scores and their softmax, both in float32."""

_SCORES_SHARE = 1 / 32
"""Share of a GPU's memory that attention scores may take: what a 2048 x 2048 decode takes anyway.
"""


def scores_per_slice(device: torch.device) -> int:
    """Attention scores computed at a time: 2^28 on a GPU of 80 GB, fewer on a smaller one."""
    if device.type == "cpu":
        return _MAX_SCORES["cpu"]
    return scores_within(torch.cuda.get_device_properties(device).total_memory)


def scores_within(memory: int) -> int:
    """The same on a GPU of so many bytes."""
    share = int(math.log2(memory * _SCORES_SHARE / BYTES_PER_SCORE))
    return min(_MAX_SCORES["cuda"], 1 << share)


def default_tile(device: torch.device) -> int:
    """Pixels a side of the tiles in which the full-resolution stage runs.

    Smaller on a CPU, whose caches then hold a tile. On a GPU they bound memory: at the released
    width a tile of this size takes about a gigabyte.
    """
    return 256 if device.type == "cpu" else 1024


class Conv(nn.Module):
    """2-D convolution, stride 1, "same" zero padding.

    Args:
        inputs, outputs: channels.
        kernel: 1 or 3.
        causal_3d: whether the checkpoint holds a causal 3-D kernel, of which only the last
            temporal slice is kept.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dtype: torch.dtype, causal_3d: bool = True
    ) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.causal_3d = causal_3d
        self.weight = parameter(outputs, inputs, kernel, kernel, dtype=dtype)
        self.bias = parameter(outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        weight = self.weight
        if self.causal_3d:
            outputs, inputs, height, width = weight.shape
            stored = (outputs, inputs, height, height, width)
            yield f"{prefix}weight", WeightSlot(weight, stored, lambda w: w[:, :, -1].contiguous())
        else:
            yield f"{prefix}weight", WeightSlot(weight)
        yield f"{prefix}bias", WeightSlot(self.bias)


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of each pixel, in float32.

    Attributes:
        fused: whether to run the kernel, which reads and writes every pixel once.
    """

    fused = False

    def __init__(self, channels: int, dims: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored_shape = (channels, *[1] * dims)
        self.gamma = parameter(channels, 1, 1, dtype=dtype)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        norm = channel_norm_triton if self.fused else channel_norm
        return norm(x, self.gamma, silu)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{prefix}gamma", WeightSlot(self.gamma, self.stored_shape)


class ResidualBlock(nn.Module):
    """norm, silu, conv, twice, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs, 3, dtype)
        self.conv1 = Conv(inputs, outputs, 3, dtype)
        self.norm2 = ChannelNorm(outputs, 3, dtype)
        self.conv2 = Conv(outputs, outputs, 3, dtype)
        self.conv_shortcut = Conv(inputs, outputs, 1, dtype) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(self.norm1(x, silu=True))
        # Under the same name: what the first convolution gave is not held while the second runs.
        x = self.norm2(x, silu=True)
        return self.conv2(x).add_(shortcut)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        for name in ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"):
            module = getattr(self, name)
            if module is not None:
                yield from module.weight_map(f"{prefix}{name}.")


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2, dtype)
        self.to_qkv = Conv(channels, channels * 3, 1, dtype, causal_3d=False)
        self.proj = Conv(channels, channels, 1, dtype, causal_3d=False)

    def slices(self, x: Tensor) -> Iterator[Tensor | None]:
        """Attend, some pixels at a time: yields None after each but the last, then the result.

        At 2048 x 2048 every one of 65,536 pixels looks at all others.
        """
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        q, k, v = qkv.chunk(3, dim=-1)
        rows = max(1, scores_per_slice(x.device) // k.shape[2])
        pieces: list[Tensor] = []
        for piece in _attend(q, k, v, rows):
            if pieces:
                yield None
            pieces.append(piece)
        out = torch.cat(pieces, dim=2).squeeze(1).transpose(1, 2).reshape(x.shape)
        yield x + self.proj(out)

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        for name in ("norm", "to_qkv", "proj"):
            yield from getattr(self, name).weight_map(f"{prefix}{name}.")


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Iterator[Tensor]:
    """Attention with one wide head, [1, 1, pixels, width] each: yields so many rows at a time."""
    if not q.is_cuda or q.dtype is torch.float32:
        for some in q.split(rows, dim=2):
            yield F.scaled_dot_product_attention(some, k, v)
        return
    # FlashAttention ends at a width of 256, and the kernel that torch would take for 384 runs at a
    # tenth of the matmul rate. Scores stay in float32 until they are weights.
    q, keys, v = (q * q.shape[-1] ** -0.5)[0, 0], k[0, 0].t(), v[0, 0]
    for some in q.split(rows):
        # In one expression: each of the large tensors goes as soon as the next one is there.
        yield torch.mm(
            torch.softmax(torch.mm(some, keys, out_dtype=torch.float32), dim=-1).to(v.dtype), v
        )[None, None]


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution that halves channels."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = Conv(channels, channels // 2, 3, dtype, causal_3d=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))

    def weight_map(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.conv.weight_map(f"{prefix}resample.1.")


class VAEDecoder(nn.Module):
    """Decoder of the Qwen-Image VAE for single frames.

    `decode` runs everything up to half the image's width and height at once, and the last stage,
    at full size, in tiles. A tile carries a margin as wide as the stage's receptive field, so
    tiled and untiled decoding give the same pixels: no seams.

    Args:
        config: sizes.
        dtype: of weights and activations.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VAEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        dims = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        # On the device from the start: to bring them there would wait for it.
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(config, name)).view(1, -1, 1, 1).to(dtype)
            self.register_buffer(name, values, persistent=False)
        self.post_quant_conv = Conv(config.z_dim, config.z_dim, 1, dtype)
        self.conv_in = Conv(config.z_dim, dims[0], 3, dtype)
        self.mid_resnets = nn.ModuleList(ResidualBlock(dims[0], dims[0], dtype) for _ in range(2))
        self.mid_attention = AttentionBlock(dims[0], dtype)
        self.up_resnets = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        last = len(dims) - 2
        for i in range(last + 1):
            inputs, outputs = dims[i] // 2 if i else dims[i], dims[i + 1]
            widths = [inputs] + [outputs] * (config.num_res_blocks + 1)
            self.up_resnets.append(
                nn.ModuleList(ResidualBlock(a, b, dtype) for a, b in pairwise(widths))
            )
            if i < last:
                self.upsamplers.append(Upsample(outputs, dtype))
        self.norm_out = ChannelNorm(dims[-1], 3, dtype)
        self.conv_out = Conv(dims[-1], 3, 3, dtype)
        # Receptive field of the last stage in its own pixels: the upsampler's convolution, two
        # per residual block, and the output convolution.
        self.margin = 1 + 2 * (config.num_res_blocks + 1) + 1

    def use_kernels(self, fused: bool = True) -> None:
        """Run norms on their kernel, which needs a GPU, or on torch again."""
        for module in self.modules():
            if isinstance(module, ChannelNorm):
                module.fused = fused

    @torch.inference_mode()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Decode images of one size.

        Args:
            latents: [n, 16, h, w], as the DiT produces them (normalised), any dtype.
            tile: pixels a side of the tiles of the last stage; 0 never tiles, None is
                `default_tile`.

        Returns:
            float32 [n, 3, 8 * h, 8 * w] in [0, 1].
        """
        return torch.stack([self._decode_one(image, tile) for image in latents])

    def _decode_one(self, latents: Tensor, tile: int | None) -> Tensor:
        *_, pixels = self.decode_slices(latents, tile)
        assert pixels is not None
        return pixels

    @torch.inference_mode()
    def decode_slices(self, latents: Tensor, tile: int | None = None) -> Iterator[Tensor | None]:
        """Decode one image in slices of work, between which other work may run.

        Args:
            latents: [16, h, w].
            tile: see `decode`.

        Yields:
            None after every slice but the last, then float32 [3, 8 * h, 8 * w] in [0, 1].
        """
        tile = default_tile(latents.device) if tile is None else tile
        x = latents[None].to(self.dtype)
        x = x * self.latents_std + self.latents_mean
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.mid_resnets[0](self.conv_in(self.post_quant_conv(x)))
        yield None
        for attended in self.mid_attention.slices(x):
            if attended is not None:
                x = attended
            yield None
        del attended
        x = self.mid_resnets[1](x)
        for i, upsample in enumerate(self.upsamplers):
            for resnet in self.up_resnets[i]:
                yield None
                x = resnet(x)
            if i < len(self.upsamplers) - 1:
                x = upsample(x)
        pixels = torch.empty(
            (1, 3, 2 * x.shape[2], 2 * x.shape[3]), dtype=torch.float32, device=x.device
        )
        for rows in _tiles(pixels.shape[2], tile, self.margin):
            for columns in _tiles(pixels.shape[3], tile, self.margin):
                yield None
                decoded = self._last_stage(x[:, :, rows.source, columns.source])
                pixels[:, :, rows.target, columns.target] = decoded[:, :, rows.keep, columns.keep]
        yield pixels.clamp_(-1, 1).mul_(0.5).add_(0.5)[0]

    def _last_stage(self, x: Tensor) -> Tensor:
        x = self.upsamplers[-1](x)
        for resnet in self.up_resnets[-1]:
            x = resnet(x)
        return self.conv_out(self.norm_out(x, silu=True))

    def weight_map(self) -> dict[str, WeightSlot]:
        """Where each tensor of a released checkpoint goes; encoder and time convs have no place."""
        found = dict(self.post_quant_conv.weight_map("post_quant_conv."))
        found |= dict(self.conv_in.weight_map("decoder.conv_in."))
        for i, resnet in enumerate(self.mid_resnets):
            found |= dict(resnet.weight_map(f"decoder.mid_block.resnets.{i}."))
        found |= dict(self.mid_attention.weight_map("decoder.mid_block.attentions.0."))
        for i, resnets in enumerate(self.up_resnets):
            for j, resnet in enumerate(resnets):
                found |= dict(resnet.weight_map(f"decoder.up_blocks.{i}.resnets.{j}."))
            if i < len(self.upsamplers):
                found |= dict(self.upsamplers[i].weight_map(f"decoder.up_blocks.{i}.upsamplers.0."))
        found |= dict(self.norm_out.weight_map("decoder.norm_out."))
        found |= dict(self.conv_out.weight_map("decoder.conv_out."))
        return found


@dataclass(frozen=True)
class _Tile:
    """One tile along one axis: input to read, its part to keep, and where that goes."""

    source: slice
    keep: slice
    target: slice


def _tiles(size: int, tile: int, margin: int) -> list[_Tile]:
    """Cut ``size`` output pixels into tiles; the input has half as many."""
    if tile <= 0 or size <= tile:
        return [_Tile(slice(None), slice(None), slice(None))]
    tiles = []
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        first = max(0, start - margin) // 2
        last = min(size, stop + margin + 1) // 2
        tiles.append(
            _Tile(
                slice(first, last), slice(start - 2 * first, stop - 2 * first), slice(start, stop)
            )
        )
    return tiles
