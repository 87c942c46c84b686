"""Attention back ends against float64, and the choice among them."""

import inspect
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from krea2_srt.errors import ConfigError
from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner import attention
from krea2_srt.runner.attention import (
    SDPA,
    AttentionBackend,
    choose_attention,
    cudnn_attention,
    flash_attention_3,
    known_backends,
    torch_varlen_attention,
)
from tests.conftest import CPU, relative_error

CUDA = torch.device("cuda")
LENGTHS = [1, 37, 0, 7]
SEGMENTS = Segments.of(LENGTHS, CPU)


def qkv(heads: int, kv_heads: int, dtype=torch.float32):
    """Views of one matrix, as the model has them."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(45, (heads + 2 * kv_heads) * 16, generator=generator).to(dtype)
    parts = fused.split([heads * 16, kv_heads * 16, kv_heads * 16], dim=1)
    return [part.unflatten(1, (-1, 16)) for part in parts]


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
    assert relative_error(sdpa_attention(q, k, v, SEGMENTS), reference(q, k, v)) <= 1e-6


@pytest.mark.parametrize("grouped", [True, False])
def test_cudnn_is_given_each_segment_once(monkeypatch, grouped):
    """cuDNN runs on CUDA only; any other SDPA in its place checks what we pass."""
    monkeypatch.setattr(attention, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=MATH))
    q, k, v = qkv(4, 1)
    out = cudnn_attention(grouped)(q, k, v, SEGMENTS)
    assert relative_error(out, reference(q, k, v)) <= 1e-6


MATH = torch.nn.attention.SDPBackend.MATH


class NoSpans(SimpleNamespace):
    """Segments as a graph has them: only what lies on the device, and the bound."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} is not known under a graph")


UNDER_A_GRAPH = NoSpans(cu_seqlens=SEGMENTS.cu_seqlens, max_seqlen=SEGMENTS.max_seqlen)


def checked(q, k, v, cu_q, cu_k, max_q, max_k):
    assert cu_q is cu_k is SEGMENTS.cu_seqlens
    assert cu_q.dtype == torch.int32
    assert max_q == max_k == 37
    assert (q.shape[1], k.shape[1], v.shape[1]) == (4, 1, 1)
    return sdpa_attention(q, k, v, SEGMENTS)


@pytest.mark.skipif(
    "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters, reason="torch < 2.14"
)
def test_torch_varlen_leaves_grouped_heads_to_a_torch_that_takes_them(monkeypatch):
    real = inspect.signature(varlen.varlen_attn)

    def with_gqa(q, k, v, *offsets, enable_gqa=False):
        real.bind(q, k, v, *offsets, enable_gqa=enable_gqa)
        assert enable_gqa
        return checked(q, k, v, *offsets)

    monkeypatch.setattr(varlen, "varlen_attn", with_gqa)
    q, k, v = qkv(4, 1)
    out = torch_varlen_attention(q, k, v, UNDER_A_GRAPH)
    assert relative_error(out, reference(q, k, v)) <= 1e-6


def test_torch_varlen_calls_the_operator_below_where_torch_does_not(monkeypatch):
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]

    def operator(*args):
        call = dict(zip(names, args, strict=False))
        assert call["dropout_p"] == 0.0
        assert not call["is_causal"]
        assert not call["return_debug_mask"]
        offsets = [call[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")]
        return (checked(call["query"], call["key"], call["value"], *offsets), None)

    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, cu_q, cu_k, max_q, max_k: None)
    fake = SimpleNamespace(aten=SimpleNamespace(_flash_attention_forward=operator))
    monkeypatch.setattr(attention.torch, "ops", fake)
    q, k, v = qkv(4, 1)
    out = torch_varlen_attention(q, k, v, UNDER_A_GRAPH)
    monkeypatch.undo()
    assert relative_error(out, reference(q, k, v)) <= 1e-6


@pytest.mark.parametrize("returns_tuple", [True, False])
def test_the_flash_attention_package_is_called_as_it_wants_to_be(monkeypatch, returns_tuple):
    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True):
        assert not causal
        out = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (out, None) if returns_tuple else out

    package = SimpleNamespace(flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q, k, v = qkv(4, 1)
    out = flash_attention_3(q, k, v, UNDER_A_GRAPH)
    assert relative_error(out, reference(q, k, v)) <= 1e-6


def test_flash_attention_4_has_the_signature_that_we_call():
    interface = pytest.importorskip("flash_attn.cute.interface")
    names = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"]
    inspect.signature(interface.flash_attn_varlen_func).bind(1, 2, 3, **dict.fromkeys(names))


# The choice. Candidates are fakes that run on the CPU, timed by how often they were called.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice can see, on which tensors are the CPU's."""
    monkeypatch.setattr(attention, "_can_flash", lambda device, dtype: True)


def fake(name, ms, capturable=True, fault=None):
    def attend(q, k, v, segments):
        if fault == "raises":
            raise RuntimeError("no kernel image\nmore of it")
        out = sdpa_attention(q, k, v, segments)
        return out + {"differs": 1.0, "nan": torch.nan, None: 0.0}[fault]

    attend.ms = ms
    return AttentionBackend(name, attend, capturable)


def choose(*candidates, forced="auto"):
    by_name = {candidate.name: candidate for candidate in candidates}
    times = {id(c.attend): c.attend.ms for c in candidates}

    def timer(function):
        backend = inspect.getclosurevars(function.__wrapped__).nonlocals["backend"]
        return times[id(backend.attend)]

    return choose_attention(CPU, torch.float32, forced, by_name, timer)


def test_the_fastest_is_chosen(gpu):
    choice = choose(fake("slow", 3), fake("fast", 1), fake("medium", 2))
    assert choice.name == "fast"
    assert choice.graph is choice.eager


def test_graphs_get_the_fastest_that_can_be_captured(gpu, caplog):
    caplog.set_level("INFO")
    choice = choose(fake("fast", 1, capturable=False), fake("slow", 3), fake("medium", 2))
    assert (choice.eager.name, choice.graph.name) == ("fast", "medium")
    assert choice.name == "fast+medium"
    (record,) = caplog.records
    for text in ("fast+medium", "fast 1, medium 2, slow 3", "256x256: medium 2, slow 3"):
        assert text in record.message


def test_one_that_goes_by_segment_must_be_clearly_faster(gpu):
    by_segment = fake("by segment", 10.0, capturable=False)
    assert choose(by_segment, fake("at once", 10.9)).eager.name == "at once"
    assert choose(by_segment, fake("at once", 11.1)).eager.name == "by segment"


def test_without_any_that_can_be_captured_graphs_get_none(gpu):
    assert choose(fake("fast", 1, capturable=False)).graph is None


@pytest.mark.parametrize("fault", ["raises", "differs", "nan"])
def test_one_that_fails_its_trial_is_passed_over(gpu, fault, caplog):
    caplog.set_level("INFO")
    assert choose(fake("broken", 1, fault=fault), fake("works", 2)).name == "works"
    passed_over = [r.message for r in caplog.records if "passed over" in r.message]
    assert len(passed_over) == 1
    assert "broken" in passed_over[0]
    assert "\n" not in passed_over[0]
    assert choose(fake("broken", 1, fault=fault)).name == "sdpa"


@pytest.mark.parametrize(("major", "name"), [(8, "any"), (9, "hopper"), (10, "any")])
def test_one_is_only_tried_on_gpus_that_it_is_made_for(gpu, monkeypatch, major, name):
    monkeypatch.setattr(attention, "_major", lambda device: major)
    candidates = [fake("any", 2), replace(fake("hopper", 1), majors=(9,))]
    assert choose(*candidates).name == name
    assert choose(*candidates, forced="hopper").name == "hopper"


def test_a_forced_one_is_taken_without_a_race(gpu):
    choice = choose(fake("fast", 1), fake("slow", 9), forced="slow")
    assert choice.name == "slow"
    assert choose(fake("slow", 9, capturable=False), forced="slow").graph is None


def test_a_forced_one_must_exist_and_work(gpu):
    with pytest.raises(ConfigError, match=r"^attention: .*auto, fast, got 'fa9'"):
        choose(fake("fast", 1), forced="fa9")
    with pytest.raises(ConfigError, match=r"^attention: broken fails .*no kernel image$"):
        choose(fake("broken", 1, fault="raises"), forced="broken")


def test_a_cpu_gets_sdpa():
    for forced in ("auto", "sdpa"):
        choice = choose_attention(CPU, torch.bfloat16, forced)
        assert (choice.name, choice.graph) == ("sdpa", None)
    with pytest.raises(ConfigError, match=r"^attention: torch_varlen does not run on cpu"):
        choose_attention(CPU, torch.bfloat16, "torch_varlen")


def test_float32_and_old_gpus_get_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention(CUDA, torch.float32).eager is SDPA
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_attention(CUDA, torch.float16).eager is SDPA


def test_backends_are_known_by_their_names():
    known = known_backends()
    assert {"sdpa", "torch_varlen", "cudnn", "cudnn_repeated"} <= known.keys()
    assert all(name == backend.name for name, backend in known.items())


def test_the_runner_needs_no_sglang_and_no_diffusers():
    program = (
        "import sys, krea2_srt.runner.model_runner, krea2_srt.runner.warm_up\n"
        "print(*{'sglang', 'diffusers', 'fastapi'} & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
