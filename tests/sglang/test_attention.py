"""SGLang's FlashAttention kernels run on GPUs only; stand-ins check how we choose and call them."""

import inspect

import pytest
import torch

from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from tests.conftest import CPU

CUDA = torch.device("cuda")


@pytest.fixture
def attention():
    from krea2_srt.sglang import attention

    return attention


@pytest.fixture
def kernels(monkeypatch):
    """Replace SGLang's kernel by SDPA behind its own signature; returns the versions called."""
    from sglang.kernels.ops.attention import flash_attention

    real = inspect.signature(flash_attention.flash_attn_varlen_func)
    called: list[int] = []

    def stand_in(*args, **kwargs):
        call = real.bind(*args, **kwargs).arguments
        assert call["cu_seqlens_q"] is call["cu_seqlens_k"]
        assert call["cu_seqlens_q"].dtype == torch.int32
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == 128
        assert not call["causal"]
        called.append(call["ver"])
        return sdpa_attention(call["q"], call["k"], call["v"], Segments.of([5, 128], CPU))

    monkeypatch.setattr(flash_attention, "flash_attn_varlen_func", stand_in)
    return called


def select(attention, monkeypatch, major, dtype=torch.bfloat16):
    """Choose for a GPU of a compute capability, with the trial run on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    check = attention._check
    monkeypatch.setattr(attention, "_check", lambda a, device, d: check(a, CPU, d))
    return attention.select_attention(CUDA, dtype)[0]


@pytest.mark.parametrize(
    ("major", "name", "versions"), [(9, "fa3", [3]), (10, "fa4", [4]), (8, "torch_varlen", [])]
)
def test_the_kernel_follows_the_gpu(attention, kernels, monkeypatch, major, name, versions):
    assert select(attention, monkeypatch, major) == name
    assert kernels == versions


def test_float32_and_cpu_get_sdpa(attention, kernels, monkeypatch):
    assert select(attention, monkeypatch, 9, torch.float32) == "sdpa"
    assert attention.select_attention(CPU, torch.bfloat16)[0] == "sdpa"
    assert not kernels


@pytest.mark.parametrize("fault", ["raises", "differs", "nan"])
def test_a_kernel_that_fails_its_trial_is_passed_over(attention, monkeypatch, fault):
    warnings: list[str] = []
    monkeypatch.setattr(attention.logger, "warning", lambda text, *v: warnings.append(text % v))

    def broken(version):
        def attend(q, k, v, segments):
            if fault == "raises":
                raise RuntimeError("no kernel image")
            return sdpa_attention(q, k, v, segments) + (1.0 if fault == "differs" else torch.nan)

        return attend

    monkeypatch.setattr(attention, "flash_attention", broken)
    assert select(attention, monkeypatch, 9) == "torch_varlen"
    assert len(warnings) == 1
    assert "FlashAttention-3 is not used" in warnings[0]
