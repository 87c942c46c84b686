"""Attention back ends: right against float64, and called as their kernels want to be called."""

import ast
import inspect
import logging
import re
import sys
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from krea2_srt.kernels.attention import SMALL
from krea2_srt.kernels.quantize_heads import quantize_qkv
from krea2_srt.model.attention import sdpa_attention
from krea2_srt.model.pack import Segments
from krea2_srt.runner.attention_backends import (
    CUDNN_VARLEN,
    FA3,
    FA4,
    FA4_RESERVE,
    TOLERANCE,
    cudnn_attention,
    flash_attention,
    known_backends,
    of_module,
    torch_varlen_attention,
    torch_varlen_repeated_attention,
)
from krea2_srt.runner.attention_trial import (
    HEAD_DIM,
    PROJECTION,
    exact_attention,
    projection_views,
)
from krea2_srt.runner.config import ATTENTION_BACKENDS
from tests.comparisons import CPU, relative_error
from tests.torch.runner.attention_stand_ins import cuda_operators, flash_attn_3

LENGTHS = [6, 37, 0, 7]
SEGMENTS = Segments.of(LENGTHS, CPU)


def qkv(heads: int, kv_heads: int, dtype=torch.bfloat16):
    """Views of one matrix, as the model has them."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(50, (heads + 2 * kv_heads) * 16, generator=generator).to(dtype)
    parts = fused.split([heads * 16, kv_heads * 16, kv_heads * 16], dim=1)
    return [part.unflatten(1, (-1, 16)) for part in parts]


def by_formula(q, k, v):
    """Softmax attention in float64, head by head, sequence by sequence."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        for start, end in SEGMENTS.spans:
            scores = q[start:end, head].double() @ k[start:end, kv_head].double().T / 16**0.5
            out[start:end, head] = scores.softmax(-1) @ v[start:end, kv_head].double()
    return out


class NoSpans(SimpleNamespace):
    """Segments as a graph has them: only what lies on the device, and the bound."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} is not known under a graph")


UNDER_A_GRAPH = NoSpans(cu_seqlens=SEGMENTS.cu_seqlens, max_seqlen=SEGMENTS.max_seqlen)


def without_memory(lengths):
    """What the model gives a back end, on a GPU that is not there; see FakeTensorMode."""
    shape, bf16 = (sum(lengths), PROJECTION * HEAD_DIM), torch.bfloat16
    ends = [0, *accumulate((*lengths, 0))]
    offsets = torch.empty(len(ends), dtype=torch.int32, device="cuda")
    segments = Segments(offsets, tuple(pairwise(ends)), max(lengths))
    return *projection_views(torch.empty(shape, dtype=bf16, device="cuda")), segments


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])


@HEADS
def test_sdpa_and_the_exact_reference_equal_float64(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads, torch.float32)
    expected = by_formula(q, k, v)
    assert relative_error(sdpa_attention(q, k, v, SEGMENTS), expected) <= 1e-6
    assert relative_error(exact_attention(q, k, v, SEGMENTS), expected) <= 1e-12


def test_sdpa_is_not_called_for_an_empty_segment(monkeypatch):
    """Some of its kernels refuse one."""
    real, lengths = torch.nn.functional.scaled_dot_product_attention, []

    def noted(q, *args, **kwargs):
        lengths.append(q.shape[2])
        return real(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    sdpa_attention(*qkv(4, 4), SEGMENTS)
    assert lengths == [6, 37, 7]


@HEADS
@pytest.mark.parametrize("grouped", [True, False])
def test_cudnn_is_given_each_segment_once(heads, kv_heads, grouped):
    q, k, v = qkv(heads, kv_heads)
    with cuda_operators():
        out = cudnn_attention(grouped)(q, k, v, SEGMENTS)
        assert torch.equal(out, exact_attention(q, k, v, SEGMENTS).bfloat16())
        with pytest.raises(ValueError, match="one token"):
            cudnn_attention(grouped)(q, k, v, Segments.of([49, 1], CPU))


@pytest.mark.parametrize("switched_on", [True, False])
def test_cudnn_does_not_touch_the_switches_of_other_threads(switched_on):
    """SGLang switches cuDNN off for SDPA, and another thread's SDPA needs the other kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = []

    class Noted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            seen.append(torch.backends.cuda.math_sdp_enabled())
            return func(*args, **(kwargs or {}))

    torch.backends.cuda.enable_cudnn_sdp(switched_on)
    try:
        with cuda_operators(), Noted():
            cudnn_attention(grouped=True)(*qkv(4, 1), SEGMENTS)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert set(seen[::2]) == {switched_on}
    assert set(seen[1::2]) == {True}


@HEADS
@pytest.mark.parametrize("attend", [torch_varlen_attention, torch_varlen_repeated_attention])
def test_torch_varlen_attends_by_offsets_on_the_device(heads, kv_heads, attend):
    q, k, v = qkv(heads, kv_heads)
    with cuda_operators():
        out = attend(q, k, v, UNDER_A_GRAPH)
    assert torch.equal(out, exact_attention(q, k, v, SEGMENTS).bfloat16())


@HEADS
def test_an_older_torch_is_asked_for_its_operators(monkeypatch, heads, kv_heads):
    """Before 2.14 `varlen_attn` takes no grouped heads, and never cuDNN."""
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, cu_q, cu_k, max_q, max_k: None)
    monkeypatch.delattr(varlen, "_can_use_cudnn", raising=False)
    q, k, v = qkv(heads, kv_heads)
    with cuda_operators():
        for attend in (torch_varlen_attention, torch_varlen_repeated_attention):
            out = attend(q, k, v, UNDER_A_GRAPH)
            assert torch.equal(out, exact_attention(q, k, v, SEGMENTS).bfloat16())


def test_the_operators_arguments_are_those_of_both_versions():
    """By position, as in torch 2.11 and 2.14."""
    for operator, names in (
        (
            torch.ops.aten._cudnn_attention_forward,
            "query key value attn_bias cum_seq_q cum_seq_k max_q max_k compute_log_sumexp "
            "dropout_p is_causal return_debug_mask",
        ),
        (
            torch.ops.aten._flash_attention_forward,
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        ),
        (
            torch.ops.aten._scaled_dot_product_cudnn_attention,
            "query key value attn_bias compute_log_sumexp",
        ),
    ):
        arguments = operator.default._schema.arguments
        expected = names.split()
        assert [a.name for a in arguments if not a.kwarg_only][: len(expected)] == expected


needs_cudnn_varlen = pytest.mark.skipif(
    not hasattr(varlen, "_can_use_cudnn"), reason="this torch never takes cuDNN by itself"
)


@needs_cudnn_varlen
@pytest.mark.parametrize("lengths", [(6, 20), (300, 290), (4160,)])
def test_torch_takes_cudnn_for_repeated_heads_and_not_for_grouped_ones(monkeypatch, lengths):
    calls = []
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: True)

    def noted(q, k, v, cu_q, cu_k, max_q, max_k, enable_gqa=False):
        calls.append(varlen._can_use_cudnn(q, k, v, max_q, [-1, -1], enable_gqa))
        assert max(lengths) <= max_q == max_k < max(lengths) + 256
        return q

    monkeypatch.setattr(varlen, "varlen_attn", noted)
    with FakeTensorMode():
        inputs = without_memory(lengths)
        torch_varlen_repeated_attention(*inputs)
        assert calls == [True]

    def grouped(q, k, v, cu_q, cu_k, max_q, max_k, enable_gqa=False):
        calls.append(varlen._can_use_cudnn(q, k, v, max_q, [-1, -1], enable_gqa))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", grouped)
    with FakeTensorMode():
        torch_varlen_attention(*without_memory(lengths))
    assert calls == [True, False]


@needs_cudnn_varlen
def test_cudnn_varlen_is_tried_where_torch_takes_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for major in range(8, 13):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, m=major: (m, 0))
        assert varlen._should_use_cudnn.__wrapped__(0) == (major in CUDNN_VARLEN)


def test_torch_does_not_log_every_call(caplog):
    caplog.set_level(logging.INFO)
    with cuda_operators():
        torch_varlen_attention(*qkv(4, 1), UNDER_A_GRAPH)
    assert not caplog.records


@pytest.mark.parametrize("lengths", [(6, 128, 333, 77), (4160,)])
def test_shapes_and_types_flow_on_a_gpu_without_a_read_of_the_offsets(monkeypatch, lengths):
    """On tensors of a CUDA device that have no memory: to read one on the host raises."""
    package = SimpleNamespace(
        flash_attn_varlen_func=lambda q, *args, **kwargs: q.new_empty(q.shape)
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    module = "krea2_srt.runner.attention_backends"
    monkeypatch.setattr(f"{module}.find_spec", lambda name: name)
    monkeypatch.setattr(f"{module}.quantize_qkv_triton", quantize_qkv)
    # Kernels of Triton read memory by address; around ours everything is as it will be.
    monkeypatch.setattr("krea2_srt.kernels.attention._attention_kernel", MagicMock())
    monkeypatch.setattr("krea2_srt.kernels.attention.tiles_of", lambda device: SMALL)
    with FakeTensorMode():
        q, k, v, segments = without_memory(lengths)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            segments.cu_seqlens.tolist()
        ran = []
        for name, backend in known_backends().items():
            if name == "fa4":
                continue  # to import it takes as long as all the rest
            spans = () if backend.capturable else segments.spans
            given = Segments(segments.cu_seqlens, spans, segments.max_seqlen)
            out = backend.attend(q, k, v, given)
            assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
            ran.append(name)
    known = {"sdpa", "torch_varlen", "torch_varlen_repeated", "cudnn", "cudnn_repeated", "fa3"}
    assert known | {"fa3_fp8", "triton_gated"} <= set(ran)


@pytest.mark.parametrize("returns_tuple", [True, False])
def test_the_flash_attention_package_is_called_as_it_wants_to_be(monkeypatch, returns_tuple):
    def function(*args, **kwargs):
        out = flash_attn_3(*args, **kwargs)
        return (out, None) if returns_tuple else out

    package = SimpleNamespace(flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q, k, v = qkv(4, 1)
    out = flash_attention(of_module("flash_attn_interface"))(q, k, v, UNDER_A_GRAPH)
    assert torch.equal(out, exact_attention(q, k, v, SEGMENTS).bfloat16())


# The stand-ins are as strict as the kernels: each rule is broken once.


def test_cudnn_refuses_a_single_key():
    x = torch.randn(1, 4, 1, 16, dtype=torch.bfloat16)
    with cuda_operators(), pytest.raises(AssertionError, match="key/value sequence length 1"):
        torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(50, 4, 16)}, None),
        ({"cum_seq_q": SEGMENTS.cu_seqlens.long()}, None),
        ({"max_q": 36}, None),
        (
            {"key": torch.randn(50, 1, 16).bfloat16(), "value": torch.randn(50, 1, 16).bfloat16()},
            "grouped",
        ),
        ({"query": torch.randn(50, 8, 16).bfloat16()[:, ::2]}, None),
    ],
)
def test_cudnn_varlen_refuses(change, message):
    x = torch.randn(50, 4, 16, dtype=torch.bfloat16)
    offsets = {"cum_seq_q": SEGMENTS.cu_seqlens, "cum_seq_k": SEGMENTS.cu_seqlens}
    call = {"query": x, "key": x, "value": x, "attn_bias": None, "max_q": 37, "max_k": 37}
    call |= offsets | {"compute_log_sumexp": True}
    with cuda_operators():
        torch.ops.aten._cudnn_attention_forward(**call)
        with pytest.raises((AssertionError, ValueError), match=message):
            torch.ops.aten._cudnn_attention_forward(**call | change)


# What the installed packages say of themselves.


def installed(package: str, file: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        pytest.skip(f"{package} has no {file}")
    return path.read_text()


def test_sgl_kernels_flash_attention_has_the_signature_and_the_gpus_that_we_have():
    source = installed("sgl_kernel", "flash_attn.py")
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    arguments = {a.arg for a in functions["flash_attn_varlen_func"].args.args}
    ours = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k causal"
    assert set(ours.split()) <= arguments
    assert {"q_descale", "k_descale", "v_descale"} <= arguments
    supported = ast.unparse(functions["is_fa3_supported"])
    assert set(map(int, re.findall(r"\[0\] == (\d+)", supported))) == set(FA3)
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert not [n.module for n in imports if (n.module or "").split(".")[0] == "sglang"]


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("flash_attn", "cute/interface.py"),
        ("sglang", "kernels/ops/attention/flash_attn/cute/interface.py"),
    ],
)
def test_flash_attention_4_is_tried_only_where_it_runs(package, file):
    source = installed(package, file)
    message = re.search(r"Unsupported compute capability\. Supported: [^)]*", source)
    assert message is not None
    supported = set(map(int, re.findall(r"\d+", message[0])))
    if "fa4_sm120.dispatch" in source:
        supported.add(12)
    assert {*FA4, *FA4_RESERVE} <= supported


def test_flash_attention_4_has_the_signature_that_we_call():
    interface = pytest.importorskip("flash_attn.cute.interface")
    names = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"]
    inspect.signature(interface.flash_attn_varlen_func).bind(1, 2, 3, **dict.fromkeys(names))


def test_backends_are_known_by_their_names(monkeypatch):
    assert set(known_backends()) <= set(ATTENTION_BACKENDS)
    monkeypatch.setattr("krea2_srt.runner.attention_backends.find_spec", lambda name: name)
    known = known_backends()
    assert set(known) == set(ATTENTION_BACKENDS)
    assert all(name == backend.name for name, backend in known.items())
    assert {b.name for b in known.values() if b.tolerance != TOLERANCE} <= {"fa3_fp8"}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"flash_attn_interface", "sgl_kernel"}, "flash_attn_interface"),
        ({"sgl_kernel"}, "sgl_kernel.flash_attn"),
        (set(), None),
    ],
)
def test_flash_attention_3_comes_from_whichever_package_is_there(monkeypatch, there, taken):
    """Without importing one: sgl_kernel loads its libraries then."""
    module = "krea2_srt.runner.attention_backends"
    monkeypatch.setattr(f"{module}.find_spec", lambda name: name if name in there else None)
    imported = []
    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_3)
    monkeypatch.setattr(f"{module}.quantize_qkv_triton", quantize_qkv)
    monkeypatch.setattr(f"{module}.import_module", lambda name: imported.append(name) or package)
    known = known_backends()
    assert ("fa3" in known) == (taken is not None)
    assert not imported
    if taken:
        known["fa3"].attend(*qkv(4, 1), UNDER_A_GRAPH)
        known["fa3_fp8"].attend(*qkv(4, 1), UNDER_A_GRAPH)
        assert set(imported) == {taken}
