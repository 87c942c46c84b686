"""FlashAttention-3 in fp8: queries, keys and values in e4m3, with a scale per segment and key/value
head, see `krea2_srt.kernels.quantize_heads`; softmax in float32, weights in e4m3.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from krea2_srt.kernels.quantize_heads import E4M3, QuantizedQkv
from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.pack import Segments

KEYS_AT_ONCE = 224
"""Keys between two updates of the maximum: FlashAttention-3's tile, for heads of 128."""

TOLERANCE = 0.3
"""Largest error on unit-variance inputs that is rounding: 0.17 on the trial's, when emulated."""

MAX_OFFSET = 8
"""FlashAttention-3 rounds 2^8 exp(scores - maximum), which uses more of e4m3's range."""


def fp8_attention(
    load: Callable[[], Callable[..., Any]],
    quantize: Callable[..., QuantizedQkv],
) -> VarlenAttention:
    """`VarlenAttention` on FlashAttention-3 in fp8. Hopper only.

    Args:
        load: returns its ``flash_attn_varlen_func``.
        quantize: `krea2_srt.kernels.quantize_heads.quantize_qkv` or its kernels.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        offsets, longest = segments.cu_seqlens, segments.max_seqlen
        q8, k8, v8 = quantize(q, k, v, offsets)
        out = load()(
            q8.values,
            k8.values,
            v8.values,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=False,
            q_descale=q8.scale,
            k_descale=k8.scale,
            v_descale=v8.scale,
        )
        # It returns bf16 whatever the model's type is, and in some versions more than that.
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.to(q.dtype)

    return attend


def emulated_flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
) -> Tensor:
    """What FlashAttention-3's kernel rounds in fp8, on any device, in place of its function.

    Tile by tile of keys, from the last one: scores and their maximum so far in float32, P rounded
    to e4m3, its sum before the rounding. Sums of products are float32, where Hopper keeps fewer
    bits of them.
    """
    segments = Segments.of(cu_seqlens_q.diff().tolist(), q.device)
    groups, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    for i, (start, end) in enumerate(segments.spans):
        q_, k_, v_ = (x[start:end].float().transpose(0, 1) for x in (q, k, v))
        k_, v_ = (x.repeat_interleave(groups, dim=0) for x in (k_, v_))
        descales = (x[i].repeat_interleave(groups)[:, None, None] for x in (q_descale, k_descale))
        scale = head_dim**-0.5 * math.log2(math.e) * math.prod(descales)
        maximum = torch.full((*q_.shape[:2], 1), -math.inf, device=q.device)
        total, result = torch.zeros_like(maximum), torch.zeros_like(q_)
        for first in reversed(range(0, end - start, KEYS_AT_ONCE)):
            keys, values = (x[:, first : first + KEYS_AT_ONCE] for x in (k_, v_))
            scores = q_ @ keys.mT
            before, maximum = maximum, torch.maximum(maximum, scores.amax(-1, keepdim=True))
            shrink = torch.exp2((before - maximum) * scale)
            weights = torch.exp2(scores * scale - (maximum * scale - MAX_OFFSET))
            total = total * shrink + weights.sum(-1, keepdim=True)
            result = result * shrink + weights.to(E4M3).float() @ values
        descale = v_descale[i].repeat_interleave(groups)[:, None, None]
        out[start:end] = (result * (descale / total)).transpose(0, 1)
    return out
