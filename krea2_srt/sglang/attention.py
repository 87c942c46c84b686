"""Attention on SGLang's FlashAttention kernels, where they run, else on torch's."""

import torch
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from torch import Tensor

from krea2_srt.model.attention import VarlenAttention, sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention import BACKENDS, default_backend

logger = init_logger(__name__)

_TOLERANCE = 2e-2
"""Largest difference to SDPA on unit-variance bf16 inputs that still counts as rounding."""


def flash_attention(version: int) -> VarlenAttention:
    """`VarlenAttention` on SGLang's FlashAttention kernel of a version (3 or 4)."""
    from sglang.kernels.ops.attention.flash_attention import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_k=segments.cu_seqlens,
            max_seqlen_q=segments.max_seqlen,
            max_seqlen_k=segments.max_seqlen,
            causal=False,
            ver=version,
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def select_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, VarlenAttention]:
    """The back end for a device: FA3 on Hopper, FA4 on Blackwell, else torch's own.

    A kernel is tried on a small pack first; one that does not build, does not run or does not
    agree with SDPA is passed over with a warning.

    Returns:
        Its name and the function.
    """
    fallback = default_backend(device, dtype)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return fallback, BACKENDS[fallback]
    major, _ = torch.cuda.get_device_capability(device)
    version = {9: 3, 10: 4}.get(major)
    if version is not None:
        try:
            attention = flash_attention(version)
            _check(attention, device, dtype)
            return f"fa{version}", attention
        except Exception as error:
            # Kernels fail in many ways (import, JIT, launch); none may keep the server down.
            logger.warning("krea2-srt: FlashAttention-%d is not used: %s", version, error)
    return fallback, BACKENDS[fallback]


def _check(attention: VarlenAttention, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(0)
    segments = Segments.of((5, 128), device)
    q, k, v = (
        torch.randn(133, heads, 128, generator=generator, device=device, dtype=dtype)
        for heads in (8, 2, 2)
    )
    expected = sdpa_attention(q, k, v, segments)
    difference = (attention(q, k, v, segments) - expected).abs().max().item()
    if not difference <= _TOLERANCE:
        raise RuntimeError(f"differs from SDPA by {difference:.3g}")
