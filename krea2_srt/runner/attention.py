"""Attention back ends by name, and the choice among them.

SGLang's FlashAttention-3/4 kernels are added by `krea2_srt.sglang`, which may import SGLang.
"""

from typing import cast

import torch
from torch import Tensor

from krea2_srt.model.attention import Spans, VarlenAttention, sdpa_attention


def torch_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spans: Spans, max_seqlen: int
) -> Tensor:
    """`VarlenAttention` on torch's own FlashAttention, one call for the whole pack. CUDA only."""
    from torch.nn.attention import varlen

    del spans
    groups = q.shape[1] // k.shape[1]
    options = {}
    if groups > 1 and _VARLEN_HAS_GQA:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return cast(Tensor, out)


# enable_gqa came with torch 2.14; before it the key/value heads are expanded.
_VARLEN_HAS_GQA = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 14)

BACKENDS: dict[str, VarlenAttention] = {
    "sdpa": sdpa_attention,
    "torch_varlen": torch_varlen_attention,
}


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the best backend that this torch has for a device and dtype."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        try:
            from torch.nn.attention import varlen  # noqa: F401
        except ImportError:
            return "sdpa"
        return "torch_varlen"
    return "sdpa"
