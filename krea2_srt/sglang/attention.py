"""SGLang's FlashAttention kernels, among the attention back ends to choose from."""

from torch import Tensor

from krea2_srt.model.attention import VarlenAttention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention import (
    BLACKWELL,
    HOPPER,
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
    """`known_backends`, with SGLang's FlashAttention-3 (Hopper) and 4 in place of packages."""
    ours = {
        name: AttentionBackend(name, flash_attention(version), True, majors)
        for name, version, majors in (("fa3", 3, HOPPER), ("fa4", 4, BLACKWELL))
    }
    return known_backends() | ours
