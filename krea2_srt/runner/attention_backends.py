"""Attention back ends by name: torch's, cuDNN's, those of FlashAttention's packages, and our own.

SGLang's FlashAttention-3/4 kernels are added by `krea2_srt.sglang`, which may import SGLang.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from krea2_srt.kernels.attention import gated_attention_triton
from krea2_srt.kernels.quantize_heads import quantize_qkv_triton
from krea2_srt.model.attention import FusedGateAttention, VarlenAttention, sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner import fp8_attention

CUDNN_VARLEN = (9, 10)
"""Where torch's ``varlen_attn`` takes cuDNN (`torch.nn.attention.varlen._should_use_cudnn`)."""

FA3 = (8, 9)
"""That SGLang's build is made for (`sgl_kernel.flash_attn.is_fa3_supported`). The package
``flash_attn_interface`` may have been built for Hopper alone, which its trial finds at once.
"""

FA4, FA4_RESERVE = (10, 11, 12), (9,)
"""flash-attn-4 and SGLang's copy of it support 8.x to 12.x (`flash_attn.cute.interface`, in
``_flash_attn_fwd``), but build their kernels at the first call, which takes half a minute. So they
are tried where they are the fastest there is, which is Blackwell and newer, and on Hopper where
nothing else is made for it. On 8.x they can win nothing: their kernel is FlashAttention-2's.
"""

TOLERANCE = 2e-2
"""Largest error on unit-variance inputs that is rounding: bf16's own is 0.008 on the trial's."""

PACKAGES = {
    "fa3": "FlashAttention-3: the package flash_attn_interface or sgl_kernel",
    "fa3_fp8": "FlashAttention-3: the package flash_attn_interface or sgl_kernel",
    "fa4": "FlashAttention-4: the package flash-attn-4",
}
"""What a back end needs that comes with an optional package."""


@dataclass(frozen=True)
class AttentionBackend:
    """One way to attend.

    Attributes:
        name: to force it by.
        attend: does it.
        capturable: it reads segment offsets on the device alone, never ``segments.spans``, so that
            a CUDA graph of it serves other lengths.
        majors: compute capabilities that it is made for; elsewhere it is tried only when forced,
            since to find out that it does not run there can take half a minute. None is any.
            With none at all, it is taken only by name.
        reserve: compute capabilities where it is tried only if the fastest that can be captured
            is not made for them.
        plans: it builds a plan for lengths that it has not seen, while their request waits.
        tolerance: largest error on unit-variance inputs that it may have.
        prompts: attends in its place where text is fused: once per prompt, so that what a step
            saves by being inexact is not to be had there. None is ``attend``.
    """

    name: str
    attend: VarlenAttention
    capturable: bool
    majors: tuple[int, ...] | None = None
    reserve: tuple[int, ...] = ()
    plans: bool = False
    tolerance: float = TOLERANCE
    prompts: VarlenAttention | None = None


def torch_varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`VarlenAttention` on torch's own FlashAttention, one call for the whole pack. CUDA only."""
    varlen, offsets, longest = _varlen(), segments.cu_seqlens, segments.max_seqlen
    if _takes_gqa(varlen.varlen_attn):
        out: Any = varlen.varlen_attn(
            q, k, v, offsets, offsets, longest, longest, enable_gqa=q.shape[1] > k.shape[1]
        )
        return out
    # Before 2.14 the Python function refuses grouped heads, which the operator below it takes.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, False, False
    )[0]


@cache
def _takes_gqa(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


_PLAN_LENGTHS = 256
"""The longest segment as cuDNN is told it is a multiple of this: a plan serves all up to it."""


def torch_varlen_repeated_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`torch_varlen_attention` with the key/value heads repeated, for which torch takes cuDNN.

    torch leaves grouped heads, and packs of up to 128 tokens a segment, to its FlashAttention-2;
    cuDNN is about half as fast again on Hopper, by its makers' figures.
    """
    k, v = _repeated(q, k, v)
    varlen, offsets = _varlen(), segments.cu_seqlens
    longest = -(-segments.max_seqlen // _PLAN_LENGTHS) * _PLAN_LENGTHS
    if hasattr(varlen, "_can_use_cudnn"):
        out: Any = varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return out
    # Older versions have the operator and never call it. They take the stride of a token to be
    # heads * head_dim. The arguments are those of 2.11 and of 2.14: query, key, value, bias,
    # offsets, lengths, log-sum-exp, dropout, causal, debug mask.
    q, k, v = (x.contiguous() for x in (q, k, v))
    return torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, offsets, offsets, longest, longest, True, 0.0, False, False
    )[0]


@cache
def _varlen() -> ModuleType:
    from torch.nn.attention import varlen

    # It says at every call, so 28 times a step, which kernel it takes.
    logging.getLogger(varlen.__name__).setLevel(logging.WARNING)
    return varlen


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def cudnn_attention(grouped: bool) -> VarlenAttention:
    """`VarlenAttention` as one call of cuDNN's kernel per segment. CUDA only.

    No segment may have one token: cuDNN does not take that, and no sequence is so short.

    Args:
        grouped: leave grouped heads to cuDNN, which older versions do not take; otherwise the
            key/value heads are repeated.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        if not grouped:
            k, v = _repeated(q, k, v)
        pieces = []
        for start, end in segments.spans:
            if start == end:
                continue
            if end == start + 1:
                raise ValueError("cuDNN does not attend to a segment of one token")
            q_, k_, v_ = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            # Not sdpa_kernel, whose switches are the whole process's: SDPA in another thread,
            # of a VAE's decode, would find no kernel meanwhile. Arguments: bias, log-sum-exp.
            out = torch.ops.aten._scaled_dot_product_cudnn_attention(q_, k_, v_, None, False)
            pieces.append(out[0].squeeze(0).transpose(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return attend


Loader = Callable[[], Callable[..., Any]]
"""Imports a package's ``flash_attn_varlen_func``, and is called in each attention: a kernel that
cannot be imported fails its trial and no more.
"""


def flash_attention(load: Loader) -> VarlenAttention:
    """`VarlenAttention` on a ``flash_attn_varlen_func``. CUDA only."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return call_flash_attention(load(), q, k, v, segments)

    return attend


def of_module(name: str) -> Loader:
    """The `Loader` of a package's module."""
    return lambda: import_module(name).flash_attn_varlen_func


def call_flash_attention(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
) -> Tensor:
    """A ``flash_attn_varlen_func`` on a pack; all packages give it the same arguments."""
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        causal=False,
    )
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def flash_attention_3(load: Loader) -> list[AttentionBackend]:
    """FlashAttention-3 in 16 bits and in fp8. The latter generates other pictures, so only the user
    chooses it.
    """
    exact = flash_attention(load)
    in_fp8 = fp8_attention.fp8_attention(load, quantize_qkv_triton)
    tolerance = fp8_attention.TOLERANCE
    return [
        AttentionBackend("fa3", exact, True, FA3),
        AttentionBackend("fa3_fp8", in_fp8, True, (), tolerance=tolerance, prompts=exact),
    ]


def flash_attention_4(load: Loader) -> AttentionBackend:
    return AttentionBackend("fa4", flash_attention(load), True, FA4, FA4_RESERVE)


SDPA = AttentionBackend("sdpa", sdpa_attention, capturable=False, plans=True)
"""Runs anywhere. Torch may take cuDNN for it, which builds plans."""


TRITON_GATED = FusedGateAttention(
    lambda q, k, v, segments: gated_attention_triton(q, k, v, None, segments.cu_seqlens),
    lambda q, k, v, gate, segments: gated_attention_triton(q, k, v, gate, segments.cu_seqlens),
)
"""Our own kernel. NVIDIA GPUs only."""


def known_backends() -> dict[str, AttentionBackend]:
    """Those of this module whose package is installed, by name.

    The package ``flash_attn_interface`` is preferred to sgl_kernel's build of the same kernels,
    which needs no SGLang: who installed it wanted it.
    """
    varlen, repeated = torch_varlen_attention, torch_varlen_repeated_attention
    found = [
        SDPA,
        AttentionBackend("torch_varlen", varlen, capturable=True),
        AttentionBackend("torch_varlen_repeated", repeated, True, CUDNN_VARLEN, plans=True),
        AttentionBackend("cudnn", cudnn_attention(grouped=True), False, plans=True),
        AttentionBackend("cudnn_repeated", cudnn_attention(grouped=False), False, plans=True),
        AttentionBackend("triton_gated", TRITON_GATED, capturable=True),
    ]
    # The latter's top level only: to look further would import it, which loads its libraries.
    if find_spec("flash_attn_interface") is not None:
        fa3 = "flash_attn_interface"
    else:
        fa3 = "sgl_kernel.flash_attn" if find_spec("sgl_kernel") is not None else ""
    if fa3:
        found += flash_attention_3(of_module(fa3))
    if find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None:
        found.append(flash_attention_4(of_module("flash_attn.cute")))
    return {backend.name: backend for backend in found}
