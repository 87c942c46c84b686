"""Which launch a kernel gets, and that a search of the fastest times what it says."""

import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from krea2_bench import tune_kernels
from krea2_bench.gpu import kernel_cases
from krea2_bench.gpu.context import Context
from krea2_bench.gpu.models import TINY
from krea2_srt.kernels import launch
from krea2_srt.kernels.launch import DEFAULTS, Launch, device_of, read_launches
from krea2_srt.kernels.operations import TRITON
from tests.torch.live_memory import fake_gpu

GPU = torch.device("cuda")
"""As users name it: without a number."""


@pytest.fixture
def gpu() -> Iterator[pytest.MonkeyPatch]:
    """Patches on top of the fake GPU's own. Those of ``monkeypatch`` would be undone after the GPU
    is gone, and bring its parts back for good.
    """
    with fake_gpu(), pytest.MonkeyPatch.context() as patches:
        yield patches


@pytest.fixture
def context(gpu) -> Context:
    """Context of a benchmark on a GPU that runs nothing, with the sizes of a trial."""
    generator = SimpleNamespace(manual_seed=lambda seed: None)
    gpu.setattr(torch, "Generator", lambda device: generator)
    context = Context(GPU, smoke=True)
    context.__dict__["dit"] = SimpleNamespace(operations=TRITON, config=TINY.dit)
    return context


@pytest.fixture
def launched(gpu) -> list[int]:
    """Warps of each kernel that was launched, in order."""
    found: list[int] = []
    gpu.setattr(
        InterpretedFunction, "run", lambda self, *_, num_warps, **__: found.append(num_warps)
    )
    return found


def test_a_device_without_a_number_is_the_current_one(gpu):
    assert device_of(GPU) is device_of(torch.device("cuda", 0))
    gpu.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of(GPU) is device_of(torch.device("cuda", 1))
    assert device_of(GPU) is not device_of(torch.device("cuda", 0))


def test_a_search_times_the_launches_that_it_tries(context, launched, gpu):
    timed: dict[str, list[int]] = {}

    def milliseconds(context, case):
        launched.clear()
        case.call()
        assert set(launched) == {device_of(GPU).launches[case.kernel].num_warps}
        timed.setdefault(case.kernel, []).extend(launched)
        return abs(launched[0] - 16) + 1.0  # 16 warps are the fastest

    gpu.setattr(tune_kernels, "_ms", milliseconds)
    found = tune_kernels.search(context)
    assert found.keys() == {case.kernel for case in kernel_cases.cases(context, 40)}
    for kernel, entry in found.items():
        assert set(timed[kernel]) == set(tune_kernels.WARPS)
        assert entry["launch"]["num_warps"] == 16
        assert device_of(torch.device("cuda", 0)).launches[kernel].num_warps == 16


def test_launches_that_fail_or_spill_are_skipped_with_a_reason(context, gpu):
    def run(self, *_, num_warps, **__):
        return SimpleNamespace(n_spills=96 if num_warps == 4 else 0)

    def milliseconds(context, case):
        warps = device_of(GPU).launches[case.kernel].num_warps
        if warps == 8:
            raise RuntimeError("too many resources requested")
        case.call()
        return float(warps)  # but for those that cannot be, fewer are faster

    gpu.setattr(tune_kernels.JITFunction, "run", run)
    gpu.setattr(InterpretedFunction, "run", lambda *a, **k: tune_kernels.JITFunction.run(*a, **k))
    gpu.setattr(tune_kernels, "_ms", milliseconds)
    found = tune_kernels.search(context)
    for kernel, entry in found.items():
        assert entry["launch"]["num_warps"] == 16
        reasons = {
            str(candidate): reason
            for candidate in tune_kernels.candidates(kernel)
            for reason in [{4: "spilled", 8: "too many resources"}.get(candidate.num_warps)]
            if reason
        }
        assert entry["skipped"].keys() == reasons.keys()
        assert all(reasons[name] in said for name, said in entry["skipped"].items())


def test_without_a_gpu_nothing_is_searched_or_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "FOLDER", tmp_path / "configs")
    with pytest.raises(SystemExit) as ended:
        tune_kernels.main(["--output", str(tmp_path / "here")])
    assert ended.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


STORED = {"launches": {"norm": {"num_warps": 4, "tokens": 2}}}


def test_a_stored_launch_and_defaults_of_what_is_not_stored(tmp_path):
    file = tmp_path / "GPU.json"
    file.write_text(json.dumps(STORED))
    assert read_launches(file) == DEFAULTS | {"norm": Launch(4, 2)}


def test_a_file_from_before_int8_is_read(tmp_path):
    file = tmp_path / "GPU.json"
    file.write_text(json.dumps({"launches": {"norm_fp8": {"num_warps": 8, "tokens": 2}}}))
    assert read_launches(file) == DEFAULTS | {"norm_8bit": Launch(8, 2)}


def test_what_is_stored_says_what_it_was_found_with(tmp_path):
    file = tmp_path / "GPU.json"
    found = {
        "norm": {"launch": {"num_warps": 4, "tokens": 2}, "gb_per_s": {"norm": 9}, "skipped": {}}
    }
    tune_kernels.store(found, file, "GPU")
    stored = json.loads(file.read_text())
    assert stored["torch"] == torch.__version__
    assert stored["triton"]
    assert read_launches(file)["norm"] == Launch(4, 2)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"launches": 3}',
        '{"launches": {"norm": 3}}',
        '{"launches": {"norm": {"warps": 4}}}',
        '{"launches": {"norm": {"num_warps": 6}}}',
        '{"launches": {"norm": {"num_warps": 64}}}',
        '{"launches": {"norm": {"num_warps": "4"}}}',
        '{"launches": {"norm": {"num_warps": 4, "tokens": 0}}}',
        '{"launches": {"norm": {"num_warps": 4}, "another": {"num_warps": 4}}}',
    ],
)
def test_a_file_with_impossible_launches_is_passed_over_with_one_line(tmp_path, caplog, content):
    file = tmp_path / "GPU.json"
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert read_launches(file) == DEFAULTS
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert "\n" not in record.getMessage()
