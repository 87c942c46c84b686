"""Attention kernels that run on GPUs only, in float64 on the CPU: as strict about what they are
given as the real ones are, by the checks in PyTorch's and FlashAttention's sources.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner import attention_trial
from krea2_srt.runner.attention_trial import exact_attention
from krea2_srt.runner.fp8_attention import emulated_flash_attention_3


def few_heads(monkeypatch) -> None:
    """Trials on two heads for one: the same rules, in less time."""
    for name, heads in (("HEADS", 2), ("KV_HEADS", 1), ("PROJECTION", 6)):
        monkeypatch.setattr(attention_trial, name, heads)


def check_half(*tensors: Tensor) -> None:
    """Same 16-bit type, unit stride along the last dimension, everything aligned to 16 bytes."""
    (dtype,) = {x.dtype for x in tensors}
    assert dtype in (torch.float16, torch.bfloat16), f"{dtype} is not supported"
    check_layout(*tensors)


def check_layout(*tensors: Tensor) -> None:
    """TMA's and cuDNN's demands on strides and addresses."""
    for x in tensors:
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        assert x.data_ptr() % 16 == 0, "must be aligned to 16 bytes"


def check_plain(*options: object) -> None:
    """What bidirectional attention without extras does not set."""
    assert not any(options), options


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> None:
    """[T, heads, head_dim] with int32 offsets on the same device, and bounds that hold."""
    assert q.ndim == k.ndim == v.ndim == 3
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2] <= 128
    for offsets, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert offsets.device == x.device
        assert isinstance(longest, int)
        assert offsets.diff().max() <= longest
        assert offsets[0] == 0
        assert offsets[-1] <= len(x)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What a varlen kernel returns; NaN where no segment is."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    segments = Segments.of(cu_seqlens.diff().tolist(), q.device)
    covered = segments.spans[-1][1]
    out[:covered] = exact_attention(q, k, v, segments)[:covered].to(q.dtype)
    return out


def flash_attention_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    """``aten::_flash_attention_forward``."""
    check_half(query, key, value)
    check_packed(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert {window_size_left, window_size_right} <= {-1, None}
    check_plain(dropout_p, is_causal, return_debug_mask, num_splits)
    check_plain(scale, seqused_k, alibi_slopes, block_table)
    out = packed_attention(query, key, value, cum_seq_q)
    return out, *(torch.empty(0) for _ in range(4))


def cudnn_attention_forward(
    query,
    key,
    value,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
    seqused_k=None,
    block_table=None,
):
    """``aten::_cudnn_attention_forward`` with offsets, as old versions have it: they compute the
    offsets of rows as if heads and tokens were contiguous.
    """
    check_half(query, key, value)
    check_packed(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert query.shape[1] == key.shape[1], "grouped heads are not taken"
    assert all(x.is_contiguous() for x in (query, key, value)), "must be contiguous"
    check_plain(dropout_p, is_causal, return_debug_mask)
    check_plain(attn_bias, scale, seqused_k, block_table)
    out = packed_attention(query, key, value, cum_seq_q)
    return out, torch.empty(0), cum_seq_q, cum_seq_k, max_q, max_k, *(torch.empty(0),) * 3


def cudnn_sdpa(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    """``aten::_scaled_dot_product_cudnn_attention``."""
    check_half(query, key, value)
    assert query.ndim == key.ndim == value.ndim == 4
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape[2] > 1, "cudnn SDPA does not support key/value sequence length 1."
    check_plain(attn_bias, dropout_p, is_causal, return_debug_mask, scale)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = exact_attention(q, k, v, Segments.of([len(q)], q.device)).to(query.dtype)
    out = out.transpose(0, 1).unsqueeze(0)
    return out, torch.empty(0), None, None, 0, 0, *(torch.empty(0),) * 3


@contextlib.contextmanager
def cuda_operators() -> Iterator[None]:
    """The above as torch's operators on CPU tensors, called through their real schemas."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", flash_attention_forward, "CPU")
        library.impl("_cudnn_attention_forward", cudnn_attention_forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention", cudnn_sdpa, "CPU")
        yield
    finally:
        library._destroy()


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """``flash_attn_interface.flash_attn_varlen_func``, in 16 bits and in fp8."""
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    descales = (q_descale, k_descale, v_descale)
    check_packed(q, k, v, *offsets)
    check_plain(seqused_q, seqused_k, softmax_scale, causal, qv, attention_chunk, softcap)
    check_plain(pack_gqa, sm_margin, return_attn_probs)
    if q.dtype != torch.float8_e4m3fn:
        check_half(q, k, v)
        check_plain(*descales)
        return packed_attention(q, k, v, cu_seqlens_q)
    assert k.dtype == v.dtype == torch.float8_e4m3fn
    assert q.shape[-1] % 16 == 0
    check_layout(q, k, v)
    for descale in descales:
        assert descale.shape == (len(cu_seqlens_q) - 1, k.shape[1])
        assert descale.dtype == torch.float32
    return emulated_flash_attention_3(q, k, v, *offsets, causal, *descales)


# Operators of their own, for graphs: they read the offsets when they run, as kernels do.

_OPERATORS = torch.library.Library("krea2_tests", "DEF")
_OPERATORS.define("by_offsets(Tensor q, Tensor k, Tensor v, Tensor offsets) -> Tensor")
_OPERATORS.define(
    "flash_attn_3(Tensor q, Tensor k, Tensor v, Tensor offsets, int longest, Tensor? q_descale, "
    "Tensor? k_descale, Tensor? v_descale) -> Tensor"
)


def _by_offsets(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    return sdpa_attention(q, k, v, Segments.of(offsets.diff().tolist(), q.device))


def _flash_attn_3(q, k, v, offsets, longest, q_descale, k_descale, v_descale):
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    return flash_attn_3(q, k, v, offsets, offsets, longest, longest, causal=False, **descales)


_OPERATORS.impl("by_offsets", _by_offsets, "CPU")
_OPERATORS.impl("flash_attn_3", _flash_attn_3, "CPU")


def by_offsets(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """SDPA of the segments that lie between offsets."""
    return torch.ops.krea2_tests.by_offsets(q, k, v, offsets)


def flash_attn_3_operator(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal,
    q_descale=None,
    k_descale=None,
    v_descale=None,
):
    """`flash_attn_3`, in a graph."""
    check_plain(causal)
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k
    descales = (q_descale, k_descale, v_descale)
    return torch.ops.krea2_tests.flash_attn_3(q, k, v, cu_seqlens_q, max_seqlen_q, *descales)
