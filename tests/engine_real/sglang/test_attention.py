"""SGLang's FlashAttention kernels run on GPUs only; stand-ins check how we call them."""

import inspect

import pytest
import torch

from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from tests.comparisons import CPU


@pytest.fixture
def called(monkeypatch):
    """Replace SGLang's kernel by SDPA behind its own signature; returns the versions called."""
    from sglang.kernels.ops.attention import flash_attention

    real = inspect.signature(flash_attention.flash_attn_varlen_func)
    versions: list[int] = []

    def stand_in(*args, **kwargs):
        call = real.bind(*args, **kwargs).arguments
        assert call["cu_seqlens_q"] is call["cu_seqlens_k"]
        assert call["cu_seqlens_q"].dtype == torch.int32
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == 128
        assert not call["causal"]
        versions.append(call["ver"])
        segments = Segments.of(call["cu_seqlens_q"].diff().tolist(), CPU)
        return sdpa_attention(call["q"], call["k"], call["v"], segments)

    monkeypatch.setattr(flash_attention, "flash_attn_varlen_func", stand_in)
    return versions


def test_sglangs_kernels_are_called_as_they_want_to_be(called):
    from krea2_srt.sglang.attention import backends

    segments = Segments.of([5, 128], CPU)
    q, k, v = (torch.randn(133, heads, 16) for heads in (4, 2, 2))
    under_a_graph = Segments(segments.cu_seqlens, (), segments.max_seqlen)
    for name, version in (("fa3", 3), ("fa4", 4)):
        backend = backends()[name]
        assert backend.capturable
        out = backend.attend(q, k, v, under_a_graph)
        assert torch.equal(out, sdpa_attention(q, k, v, segments))
        assert called.pop() == version


def test_they_are_candidates_beside_those_of_torch(called):
    from krea2_srt.runner.attention import choose_attention
    from krea2_srt.sglang.attention import backends

    assert {"sdpa", "torch_varlen", "cudnn", "fa3", "fa3_fp8", "fa4"} <= backends().keys()
    assert choose_attention(CPU, torch.bfloat16, candidates=backends()).name == "sdpa"
    assert not called
