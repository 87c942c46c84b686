"""A back end is trusted only after its trial, eager and replayed."""

from dataclasses import replace

import pytest
import torch

from krea2_srt.model.attention import FusedGateAttention, sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner import attention_trial
from krea2_srt.runner.attention_backends import TOLERANCE, AttentionBackend, known_backends
from krea2_srt.runner.attention_trial import (
    LENGTHS,
    OTHER_LENGTHS,
    packed_inputs,
    replay_fault,
    trial_fault,
)
from tests.comparisons import CPU
from tests.torch.runner.attention_stand_ins import by_offsets, cuda_operators, few_heads
from tests.torch.runner.recorded_graph import record

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    few_heads(monkeypatch)


GOOD = AttentionBackend("good", lambda q, k, v, s: by_offsets(q, k, v, s.cu_seqlens), True)


def test_the_lengths_are_those_that_packs_can_have():
    """At least 5 tokens of text and one of an image, which cuDNN's least of 2 is far from."""
    assert min(LENGTHS) >= 6
    assert min(length for length in OTHER_LENGTHS if length) >= 6
    assert sum(LENGTHS) == sum(OTHER_LENGTHS)
    assert len(LENGTHS) == len(OTHER_LENGTHS)


def test_inputs_are_views_of_a_fused_projection():
    q, k, v, segments = packed_inputs(LENGTHS, CPU, BF16)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (2, 1, 1)
    assert q.stride() == k.stride() == v.stride() == (6 * 128, 128, 1)
    assert segments.spans[-1] == (544, 544)


@pytest.mark.parametrize("name", sorted({"sdpa", "torch_varlen", "torch_varlen_repeated"}))
def test_torchs_own_pass(name):
    with cuda_operators():
        assert trial_fault(known_backends()[name], CPU, BF16) == ""


@pytest.mark.parametrize("name", ["cudnn", "cudnn_repeated"])
def test_cudnn_passes_though_it_refuses_what_no_pack_has(monkeypatch, name):
    with cuda_operators():
        assert trial_fault(known_backends()[name], CPU, BF16) == ""
        monkeypatch.setattr(attention_trial, "LENGTHS", (6, 1))
        assert "one token" in trial_fault(known_backends()[name], CPU, BF16)


def raising(q, k, v, segments):
    raise RuntimeError("no kernel image\nmore of it")


def off_by(amount):
    return lambda q, k, v, segments: by_offsets(q, k, v, segments.cu_seqlens) + amount


@pytest.mark.parametrize(
    ("attend", "fault"),
    [
        (raising, "RuntimeError: no kernel image"),
        (off_by(1.0), "differs from float64 by 1"),
        (off_by(torch.nan), "differs from float64 by nan"),
        (lambda q, k, v, s: k, "returns the shape [544, 1, 128], not [544, 2, 128]"),
        (lambda q, k, v, s: by_offsets(q, k, v, s.cu_seqlens[[0, 4]]), "differs from float64 by"),
    ],
)
def test_a_fault_is_told_in_one_line(attend, fault):
    found = trial_fault(replace(GOOD, attend=attend), CPU, BF16)
    assert found.startswith(fault)
    assert "\n" not in found


def test_a_back_end_may_have_a_tolerance_of_its_own():
    coarse = replace(GOOD, attend=off_by(2 * TOLERANCE))
    assert trial_fault(coarse, CPU, BF16).startswith("differs")
    assert trial_fault(replace(coarse, tolerance=3 * TOLERANCE), CPU, BF16) == ""


def test_that_there_is_no_memory_for_the_trial_is_a_fault(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_trial, "exact_attention", full)
    assert trial_fault(GOOD, CPU, BF16) == "OutOfMemoryError: CUDA out of memory"


# Capturable ones are replayed on another pack. The graph repeats operations on the same memory.


def test_one_that_reads_offsets_on_the_device_passes():
    assert replay_fault(GOOD, CPU, BF16, record) == ""
    assert trial_fault(GOOD, CPU, BF16, record) == ""


def by_spans(q, k, v, segments):
    return sdpa_attention(q, k, v, segments)


def by_a_copy(q, k, v, segments):
    """The offsets reached the kernel by way of the host."""
    return by_offsets(q, k, v, torch.from_numpy(segments.cu_seqlens.numpy().copy()))


def by_host(q, k, v, segments):
    return sdpa_attention(q, k, v, Segments.of(segments.cu_seqlens.diff().tolist(), CPU))


@pytest.mark.parametrize("attend", [by_spans, by_a_copy, by_host])
def test_one_whose_graph_serves_no_other_pack_fails(attend):
    """Though it is right when it is launched."""
    pretends = replace(GOOD, attend=attend)
    assert trial_fault(replace(pretends, capturable=False), CPU, BF16, record) == ""
    found = trial_fault(pretends, CPU, BF16, record)
    assert found.startswith("replayed in a graph on other lengths, it differs from float64 by")


def test_a_failed_capture_is_a_fault():
    def refuses(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    found = trial_fault(GOOD, CPU, BF16, refuses)
    assert found == "RuntimeError: operation not permitted when stream is capturing"
    assert trial_fault(replace(GOOD, capturable=False), CPU, BF16, refuses) == ""


# One that gates what it writes is tried with its gate, too.


@torch.library.custom_op("krea2_tests::attend_and_gate_by_offsets", mutates_args=())
def gated_by_offsets(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, cu: torch.Tensor
) -> torch.Tensor:
    out = sdpa_attention(q, k, v, Segments.of(cu.diff().tolist(), CPU))
    return out * torch.sigmoid(gate).unflatten(1, (-1, 128))


def gated_by(change=lambda gate: gate, offsets=lambda cu: cu) -> AttentionBackend:
    def attend_gated(q, k, v, gate, segments):
        return gated_by_offsets(q, k, v, change(gate), offsets(segments.cu_seqlens))

    return replace(GOOD, attend=FusedGateAttention(GOOD.attend, attend_gated))


def test_one_that_gates_passes():
    assert trial_fault(gated_by(), CPU, BF16, record) == ""


@pytest.mark.parametrize(
    "change", [torch.zeros_like, lambda gate: gate.roll(1, 1), lambda gate: gate * torch.nan]
)
def test_one_that_gates_wrongly_fails(change):
    found = trial_fault(gated_by(change), CPU, BF16, record)
    assert found.startswith("gated, it differs from float64 by")


def test_one_that_gates_is_replayed_with_its_gate():
    fixed = gated_by(offsets=lambda cu: torch.from_numpy(cu.numpy().copy()))
    found = trial_fault(fixed, CPU, BF16, record)
    assert found.startswith("replayed in a graph on other lengths, it differs from float64 by")
