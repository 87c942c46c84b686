"""The choice among attention back ends. Candidates are fakes that run on the CPU, timed by what
they are said to take.
"""

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from krea2_srt.errors import ConfigError
from krea2_srt.kernels.operations import TORCH
from krea2_srt.model.attention import FusedGateAttention, sdpa_attention
from krea2_srt.runner import attention
from krea2_srt.runner.attention import choose_attention
from krea2_srt.runner.attention_backends import SDPA, AttentionBackend
from tests.comparisons import CPU
from tests.torch.runner.attention_stand_ins import few_heads

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper as far as the choice can see, on which tensors are the CPU's, and of few heads."""
    monkeypatch.setattr(attention, "_can_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_major", lambda device: 9)
    monkeypatch.setattr(attention, "LARGE_PACK", (64,))
    monkeypatch.setattr(attention, "SMALL_PACK", (16, 16))
    few_heads(monkeypatch)


def fake(name, ms, capturable=True, fault=None, **fields):
    def attend(q, k, v, segments):
        if fault == "raises":
            raise RuntimeError("no kernel image\nmore of it")
        out = sdpa_attention(q, k, v, segments)
        return out + {"differs": 1.0, "nan": torch.nan, None: 0.0}[fault]

    attend.ms = ms
    return AttentionBackend(name, attend, capturable, **fields)


def choose(*candidates, forced="auto"):
    by_name = {candidate.name: candidate for candidate in candidates}

    def timer(function):
        backend = inspect.getclosurevars(function.__wrapped__).nonlocals["backend"]
        if backend.attend.ms is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backend.attend.ms

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
    graph = "256x256 in a graph: medium 2, slow 3"
    for text in ("fast+medium", "fast 1, medium 2, slow 3", graph, "out: none"):
        assert text in record.message


def test_one_that_builds_plans_must_be_clearly_faster(gpu):
    plans = fake("plans", 10.0, plans=True)
    assert choose(plans, fake("without", 10.9)).eager.name == "without"
    assert choose(plans, fake("without", 11.1)).eager.name == "plans"


def test_without_any_that_can_be_captured_graphs_get_none(gpu):
    assert choose(fake("fast", 1, capturable=False)).graph is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "broken (RuntimeError: no kernel image)"),
        ("differs", "broken (differs from float64 by 1"),
        ("nan", "broken (differs from float64 by nan)"),
    ],
)
def test_one_that_fails_its_trial_is_out_and_the_log_says_why(gpu, fault, reason, caplog):
    caplog.set_level("INFO")
    assert choose(fake("broken", 1, fault=fault), fake("works", 2)).name == "works"
    assert choose(fake("broken", 1, fault=fault)).name == "sdpa"
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert reason in record.message
        assert "\n" not in record.message


def test_one_that_cannot_do_a_whole_picture_is_out(gpu, caplog):
    """A failure never ends the start: memory may run out at the size on which it is timed."""
    caplog.set_level("INFO")
    assert choose(fake("large", None), fake("works", 2)).name == "works"
    assert "large (OutOfMemoryError: CUDA out of memory)" in caplog.text


@pytest.mark.parametrize(("major", "name"), [(8, "any"), (9, "hopper"), (10, "any")])
def test_one_is_only_tried_on_gpus_that_it_is_made_for(gpu, monkeypatch, major, name, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(attention, "_major", lambda device: major)
    candidates = [fake("any", 2), replace(fake("hopper", 1), majors=(9,))]
    assert choose(*candidates).name == name
    assert ("hopper (made for compute capability 9.x)" in caplog.text) == (major != 9)
    assert choose(*candidates, forced="hopper").name == "hopper"


def test_one_that_takes_long_to_build_waits_for_whether_it_is_needed(gpu, caplog):
    """It comes last, and only where nothing faster is made for the GPU."""
    caplog.set_level("INFO")
    late = fake("late", 1, fault="raises", majors=(10,), reserve=(9,))
    any_gpu, hopper = fake("any", 3), fake("hopper", 2, majors=(9,))
    assert choose(late, any_gpu, hopper).name == "hopper"
    assert "late (takes half a minute to build, and hopper is there)" in caplog.text
    caplog.clear()
    choose(late, any_gpu)
    assert "late (RuntimeError: no kernel image)" in caplog.text
    works = replace(late, attend=fake("late", 1).attend)
    for others in ([any_gpu], [any_gpu, replace(hopper, attend=fake("", 4).attend)], []):
        assert choose(works, *others).name == "late"


def test_one_for_no_gpu_is_only_taken_by_name(gpu, caplog):
    caplog.set_level("INFO")
    coarse = fake("coarse", 1, majors=())
    assert choose(coarse, fake("works", 2)).name == "works"
    assert "coarse (only by name)" in caplog.text
    assert choose(coarse, fake("works", 2), forced="coarse").name == "coarse"


# One that gates what it writes saves the gate's own kernel.


@pytest.fixture
def clock(monkeypatch):
    """Times by what runs: a list of milliseconds, and 1 of the gate's own kernel."""
    passed: list[float] = []

    def sigmoid_gate(out, gate, format=None):
        passed.append(1.0)
        return TORCH.sigmoid_gate(out, gate, format)

    do = replace(TORCH, sigmoid_gate=sigmoid_gate)
    monkeypatch.setattr(attention, "default_operations", lambda device: do)
    return passed


def timed(name, clock, ms, gates=False):
    def attend(q, k, v, segments):
        clock.append(ms)
        return sdpa_attention(q, k, v, segments)

    def attend_gated(q, k, v, gate, segments):
        out = attend(q, k, v, segments)
        return out * torch.sigmoid(gate).view_as(out)

    kind = FusedGateAttention(attend, attend_gated) if gates else attend
    return AttentionBackend(name, kind, capturable=True)


def race(clock, *candidates, **options):
    def timer(function):
        clock.clear()
        function()
        return sum(clock)

    by_name = {candidate.name: candidate for candidate in candidates}
    return choose_attention(CPU, torch.float32, candidates=by_name, timer=timer, **options)


@pytest.mark.parametrize(("ms", "name"), [(10.9, "gates"), (11.1, "plain")])
def test_one_that_gates_is_chosen_where_it_is_faster_than_another_and_the_gate(
    gpu, clock, caplog, ms, name
):
    caplog.set_level("INFO")
    candidates = timed("plain", clock, 10.0), timed("gates", clock, ms, gates=True)
    assert race(clock, *candidates).name == name
    assert "plain 11" in caplog.text


def test_one_that_gates_is_out_where_the_gate_belongs_to_something_else(gpu, clock, caplog):
    caplog.set_level("INFO")
    candidates = timed("plain", clock, 10.0), timed("gates", clock, 1.0, gates=True)
    assert race(clock, *candidates, fused_gate=False).name == "plain"
    assert "1024x1024: plain 10;" in caplog.text
    assert "gates (its gate is of no use here)" in caplog.text


def test_a_forced_one_is_taken_without_a_race(gpu):
    choice = choose(fake("fast", 1), fake("slow", 9), forced="slow")
    assert choice.name == "slow"
    assert choose(fake("slow", 9, capturable=False), forced="slow").graph is None


def test_a_forced_one_must_exist_and_work(gpu):
    with pytest.raises(ConfigError, match=r"^attention: .*auto, fast, got 'fa9'"):
        choose(fake("fast", 1), forced="fa9")
    with pytest.raises(ConfigError, match=r"^attention: fa4 is not installed; it needs .*flash-a"):
        choose(fake("fast", 1), forced="fa4")
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


def test_the_runner_needs_no_sglang_and_no_diffusers():
    program = (
        "import sys, krea2_srt.runner.model_runner, krea2_srt.runner.warm_up\n"
        "print(*{'sglang', 'diffusers', 'fastapi'} & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
