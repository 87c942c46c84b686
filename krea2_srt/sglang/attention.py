"""SGLang's FlashAttention kernels, among the attention back ends to choose from."""

from torch import Tensor

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention_backends import (
    FA3,
    FA4,
    FA4_RESERVE,
    AttentionBackend,
    call_flash_attention,
    known_backends,
)


def flash_attention(version: int) -> VarlenAttention:
    """`VarlenAttention` on SGLang's FlashAttention kernel of a version (3 or 4)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        # Here, so that a kernel that cannot be imported fails its trial and no more.
        from sglang.kernels.ops.attention.flash_attention import flash_attn_varlen_func

        return call_flash_attention(flash_attn_varlen_func, q, k, v, segments, ver=version)

    return attend


def backends() -> dict[str, AttentionBackend]:
    """`known_backends`, with SGLang's FlashAttention-3 and 4 in place of packages."""
    ours = [
        AttentionBackend("fa3", flash_attention(3), True, FA3),
        AttentionBackend("fa4", flash_attention(4), True, FA4, FA4_RESERVE),
    ]
    return known_backends() | {backend.name: backend for backend in ours}
