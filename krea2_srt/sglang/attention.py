"""SGLang's FlashAttention kernels, among the attention back ends to choose from."""

from functools import partial

from krea2_srt.runner.attention_backends import (
    AttentionBackend,
    Loader,
    flash_attention_3,
    flash_attention_4,
    known_backends,
)


def of_version(version: int) -> Loader:
    """The `Loader` of SGLang's FlashAttention kernel of a version (3 or 4)."""

    def load() -> partial[object]:
        from sglang.kernels.ops.attention.flash_attention import flash_attn_varlen_func

        return partial(flash_attn_varlen_func, ver=version)

    return load


def backends() -> dict[str, AttentionBackend]:
    """`known_backends`, with SGLang's FlashAttention-3 and 4 in place of packages."""
    ours = [*flash_attention_3(of_version(3)), flash_attention_4(of_version(4))]
    return known_backends() | {backend.name: backend for backend in ours}
