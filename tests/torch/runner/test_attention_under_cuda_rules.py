"""The choice of attention as a GPU would see it: trials, captures, replays and the race on it."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tests.torch.interpreted_triton  # noqa: F401 (first)
from krea2_srt.runner import attention_backends
from krea2_srt.runner.attention import choose_attention
from krea2_srt.runner.attention_backends import known_backends
from krea2_srt.runner.attention_trial import trial_fault
from tests.torch.cuda_rules import Rule, cuda_rules

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """A Hopper with every package whose kernels can be stood in for."""
    there = {"flash_attn_interface"}
    monkeypatch.setattr(
        attention_backends, "find_spec", lambda name: name if name in there else None
    )

    def flash_attn_varlen_func(q, k, v, **options):
        half = BF16 if q.dtype is torch.float8_e4m3fn else q.dtype
        return q.new_empty(q.shape, dtype=half)

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    with cuda_rules() as machine:
        yield machine


def test_every_candidate_is_tried_captured_and_timed(machine, caplog):
    """In bf16 and by name in fp8, whose quantisation runs in a graph too."""
    caplog.set_level("INFO")
    choice = choose_attention(CUDA, BF16)
    assert choice.graph is not None
    (record,) = [r for r in caplog.records if "krea2-srt: attention" in r.message]
    _, eager, graph, out = record.message.split("; ")
    for name in ("sdpa", "torch_varlen", "torch_varlen_repeated", "triton_gated", "fa3"):
        assert f"{name} 0." in eager, record.message
        assert (f"{name} 0." in graph) == known_backends()[name].capturable, record.message
    assert "fa3_fp8 (only by name)" in out
    assert choose_attention(CUDA, BF16, "fa3_fp8").name == "fa3_fp8"


def test_a_capture_that_fails_is_a_fault_and_the_next_one_works(machine):
    def by_host(q, k, v, segments):
        segments.cu_seqlens.tolist()
        return torch.empty_like(q)

    good = known_backends()["torch_varlen"]
    for _ in range(2):
        with machine.breaks(Rule.HOST_READ):
            found = trial_fault(replace(good, attend=by_host), CUDA, BF16)
            assert "host read" in found
        assert trial_fault(good, CUDA, BF16) == ""
