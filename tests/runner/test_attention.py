"""Attention back ends against float64."""

import inspect

import pytest
import torch

from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention import BACKENDS, default_backend
from tests.conftest import CPU, relative_error

SEGMENTS = Segments.of([1, 37, 7], CPU)


def qkv(heads: int, kv_heads: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(45, h, 16, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)
    ]


def reference(q, k, v):
    """Softmax attention in float64, head by head, sequence by sequence."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        for start, end in SEGMENTS.spans:
            scores = q[start:end, head].double() @ k[start:end, kv_head].double().T / 16**0.5
            out[start:end, head] = scores.softmax(-1) @ v[start:end, kv_head].double()
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_sdpa_equals_float64(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads)
    out = BACKENDS["sdpa"](q, k, v, SEGMENTS)
    assert relative_error(out, reference(q, k, v)) <= 1e-6


@pytest.mark.parametrize("has_gqa", [True, False])
def test_torch_varlen_is_called_as_it_wants_to_be(monkeypatch, has_gqa):
    """torch's kernel runs on CUDA only; a stand-in with its signature checks what we pass."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def check(q, k, v, cu_q, cu_k, max_q, max_k, enable_gqa):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == max_k == 37
        assert enable_gqa == has_gqa
        assert k.shape[1] == (1 if has_gqa else 4)
        return BACKENDS["sdpa"](q, k, v, SEGMENTS)

    real = inspect.signature(varlen.varlen_attn)

    def with_gqa(q, k, v, cu_q, cu_k, max_q, max_k, *, enable_gqa=False):
        real.bind(q, k, v, cu_q, cu_k, max_q, max_k, enable_gqa=enable_gqa)
        return check(q, k, v, cu_q, cu_k, max_q, max_k, enable_gqa)

    def without_gqa(q, k, v, cu_q, cu_k, max_q, max_k):
        return check(q, k, v, cu_q, cu_k, max_q, max_k, False)

    monkeypatch.setattr(varlen, "varlen_attn", with_gqa if has_gqa else without_gqa)
    q, k, v = qkv(4, 1)
    out = BACKENDS["torch_varlen"](q, k, v, SEGMENTS)
    assert relative_error(out, reference(q, k, v)) <= 1e-6


def test_a_cpu_gets_sdpa():
    assert default_backend(CPU, torch.bfloat16) == "sdpa"
