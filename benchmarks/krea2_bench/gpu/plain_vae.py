"""The baseline: the VAE's decoder as released, with causal 3-D convolutions and a frame axis.

It computes what our `VAEDecoder` computes, from the same weights: kernels have two more temporal
slices, which see the zeros before the only frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.model.vae import ChannelNorm, Conv, ResidualBlock, VAEDecoder


class Decoder3D:
    """Decodes one image, [16, h, w] -> float32 [3, 8 * h, 8 * w].

    Args:
        vae: whose weights it takes.
    """

    def __init__(self, vae: VAEDecoder) -> None:
        self._vae = vae
        self._kernels: dict[nn.Module, Tensor] = {}
        for conv in vae.modules():
            if isinstance(conv, Conv) and conv.causal_3d:
                size = conv.weight.shape[-1]
                before = conv.weight.new_zeros(*conv.weight.shape[:2], size - 1, size, size)
                kernel = torch.cat([before, conv.weight[:, :, None]], dim=2)
                self._kernels[conv] = kernel.contiguous()

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        vae = self._vae
        x = latents[None].to(vae.dtype) * vae.latents_std + vae.latents_mean
        x = x[:, :, None].contiguous()  # one frame
        x = self._conv(vae.conv_in, self._conv(vae.post_quant_conv, x))
        x = self._residual(vae.mid_resnets[0], x)
        x = self._residual(vae.mid_resnets[1], self._attention(x))
        for i, resnets in enumerate(vae.up_resnets):
            for resnet in resnets:
                x = self._residual(resnet, x)
            if i < len(vae.upsamplers):
                # As released: every frame in float32, and back.
                frame = F.interpolate(x[:, :, 0].float(), scale_factor=2.0, mode="nearest-exact")
                conv = vae.upsamplers[i].conv
                frame = F.conv2d(frame.to(x.dtype), conv.weight, conv.bias, padding=1)
                x = frame[:, :, None]
        x = self._conv(vae.conv_out, F.silu(self._norm(vae.norm_out, x)))
        return x[0, :, 0].float().clamp(-1, 1) * 0.5 + 0.5

    def _conv(self, conv: Conv, x: Tensor) -> Tensor:
        pad = conv.padding
        x = F.pad(x, (pad, pad, pad, pad, 2 * pad, 0))
        return F.conv3d(x, self._kernels[conv], conv.bias)

    def _norm(self, norm: ChannelNorm, x: Tensor) -> Tensor:
        gamma = norm.gamma.view(-1, *[1] * (x.dim() - 2))
        return F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * gamma

    def _residual(self, block: ResidualBlock, x: Tensor) -> Tensor:
        shortcut = x if block.conv_shortcut is None else self._conv(block.conv_shortcut, x)
        x = self._conv(block.conv1, F.silu(self._norm(block.norm1, x)))
        return self._conv(block.conv2, F.silu(self._norm(block.norm2, x))) + shortcut

    def _attention(self, x: Tensor) -> Tensor:
        block, frame = self._vae.mid_attention, x[:, :, 0]
        qkv = F.conv2d(self._norm(block.norm, frame), block.to_qkv.weight, block.to_qkv.bias)
        qkv = qkv.flatten(2).transpose(1, 2)[:, None].contiguous()
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        out = out[:, 0].transpose(1, 2).reshape(frame.shape)
        return x + F.conv2d(out, block.proj.weight, block.proj.bias)[:, :, None]
