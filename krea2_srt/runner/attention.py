"""Attention back ends by name, and the choice among them.

SGLang's FlashAttention-3/4 kernels are added by `krea2_srt.sglang`, which may import SGLang.
"""

import inspect
from typing import cast

import torch
from torch import Tensor

from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.pack import Segments


def torch_varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` on torch's own FlashAttention, one call for the whole pack. CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    options = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:
        # Older torch: the key/value heads have to be expanded.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    offsets, longest = segments.cu_seqlens, segments.max_seqlen
    return cast(Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest, **options))


BACKENDS: dict[str, VarlenAttention] = {
    "sdpa": sdpa_attention,
    "torch_varlen": torch_varlen_attention,
}


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the best backend that this torch has for a device and dtype."""
    half = dtype in (torch.float16, torch.bfloat16)
    # FlashAttention needs Ampere or newer.
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device)[0] >= 8:
        try:
            from torch.nn.attention import varlen  # noqa: F401
        except ImportError:
            return "sdpa"
        return "torch_varlen"
    return "sdpa"
