"""Runs of the GPU benchmark that are killed, crash, go on, or have clocks to read."""

import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from krea2_bench.gpu import record, run
from krea2_bench.gpu.clocks import Clocks, ClockSampler
from krea2_bench.gpu.parts import PARTS
from krea2_bench.gpu.record import Record
from krea2_bench.gpu.rows import FAILED, LEFT_OUT, Row
from krea2_bench.gpu.sources import sources
from tests.channel import wait_until

QUICK = ("ceilings", "gemm", "attention", "kernels")
"""Parts that need no model."""


def main(folder: Path, *arguments: str) -> int:
    return gpu.main(["--smoke", "--output", str(folder), *arguments])


def table(folder: Path) -> dict:
    """What is in the tables, made again from the rows."""
    assert gpu.main(["--report", str(folder), "--output", str(folder)]) == 0
    stored = json.loads((folder / "gpu.json").read_text())
    page = (folder / "gpu.md").read_text()
    for row in stored["rows"]:
        assert f"| {row['what']} | " in page
    return stored


def stand_in(name: str) -> Callable:
    """In place of a part that takes long."""
    return lambda context: context.findings.add(Row(name, "figure", 1.0, "ms"))


def raises(context) -> None:
    raise RuntimeError("a launch failed")


def hangs(context) -> None:
    time.sleep(60)


CRASHES: dict[str, Callable] = {
    "exit": lambda context: os._exit(9),
    "exception": raises,
    "hang": hangs,
}


@pytest.mark.parametrize(
    "crashing", [list(PARTS)[::4], pytest.param(list(PARTS), marks=pytest.mark.slow)]
)
def test_each_part_in_turn_crashes_and_all_others_are_measured(tmp_path, monkeypatch, crashing):
    monkeypatch.setattr(run, "TRIAL_PATIENCE", 0.02)
    monkeypatch.setattr(run, "sources", lambda: {"commit": None, "hash": "0"})
    monkeypatch.setattr(record.os, "fsync", lambda file: None)
    for name, part in PARTS.items():
        # Some in the same child, some in others.
        group = "kernels" if part.first_call else "packs"
        quick = replace(part, run=stand_in(name), group=group, seconds=3000)
        monkeypatch.setitem(PARTS, name, quick)
    for name, crash in zip(crashing, cycle(CRASHES.values()), strict=False):
        with monkeypatch.context() as patch:
            seconds = 0 if crash is hangs else 3000
            patch.setitem(PARTS, name, replace(PARTS[name], run=crash, seconds=seconds))
            assert main(tmp_path / name) == 1
        stored = json.loads((tmp_path / name / "gpu.json").read_text())
        assert {row["part"] for row in stored["rows"]} == PARTS.keys() - {name}
        (missing,) = stored["missing"]
        assert (missing["part"], missing["why"]) == (name, FAILED)
        assert set(stored["done"]) == PARTS.keys() - {name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"), [("steps", "exit"), ("text", "exception"), ("vae", "hang")]
)
def test_what_is_really_measured_survives_a_crash(tmp_path, monkeypatch, name, way):
    """As above, with the true others; the one that hangs is given 15 s."""
    part = replace(PARTS[name], run=CRASHES[way], seconds=0 if way == "hang" else 1000)
    monkeypatch.setitem(PARTS, name, part)
    if way == "hang":
        monkeypatch.setattr(run, "TRIAL_PATIENCE", 1.0)
        for other in PARTS.keys() - {name}:
            monkeypatch.setitem(PARTS, other, replace(PARTS[other], seconds=300))
    assert main(tmp_path) == 1
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert set(stored["done"]) == PARTS.keys() - {name}
    assert {missing["part"] for missing in stored["missing"] if missing["why"] == FAILED} == {name}


def killed_after(folder: Path, lines: int, wait_s: float, whom: str, parts: tuple[str, ...]) -> int:
    """Begin a run, and kill it, or its child, when the file of rows has some lines.

    Returns:
        How the run ended, as `os.waitstatus_to_exitcode` has it.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = main(folder, "--only", *parts)
        os._exit(code)
    file = folder / record.NAME
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.001)
    time.sleep(wait_s)
    victim = pid if whom == "parent" else _child_of(pid)
    if victim is not None:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGTERM if whom == "gently" else signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child_of(pid: int) -> int | None:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def check_killed(folder: Path, lines: int, whom: str, parts: tuple[str, ...]) -> None:
    found = record.read(folder)
    assert found is not None
    header, entries = found
    assert header["sources"] == sources()
    assert len(entries) + 1 >= lines
    stored = table(folder)
    rows = {(e["part"], e["what"]) for e in entries if e["kind"] == "row"}
    assert {(row["part"], row["what"]) for row in stored["rows"]} == rows
    if whom == "child":  # the parent goes on with another one
        begun = [e["part"] for e in entries if e["kind"] == "begin"]
        assert begun == list(parts)


def test_a_run_that_is_killed_at_any_time_leaves_a_table(tmp_path):
    draw = random.Random(1)
    # A header, and then rows of the first part, of its end, and of those after it.
    for number, whom in enumerate(("parent", "child", "parent")):
        folder, lines = tmp_path / str(number), draw.randint(1, 30)
        killed_after(folder, lines, draw.uniform(0, 0.05), whom, QUICK)
        check_killed(folder, lines, whom, QUICK)


@pytest.mark.slow
def test_the_whole_run_is_killed_at_many_moments(tmp_path):
    draw = random.Random(2)
    for number in range(8):
        whom = draw.choice(("parent", "child"))
        folder, lines = tmp_path / str(number), draw.randint(1, 160)
        killed_after(folder, lines, draw.uniform(0, 0.3), whom, tuple(PARTS))
        check_killed(folder, lines, whom, tuple(PARTS))


def test_a_torn_line_does_not_count(tmp_path):
    Record(tmp_path, {"smoke": True}, []).append(Row("a", "b", 1.0, "ms").entry())
    whole = (tmp_path / record.NAME).read_bytes()
    for cut in range(len(whole) + 1):
        (tmp_path / record.NAME).write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        if lines == 0:
            with pytest.raises(ValueError, match="does not begin with a header"):
                record.read(tmp_path)
        else:
            header, entries = record.read(tmp_path)
            assert header == {"smoke": True}
            assert len(entries) == lines - 1


def test_a_run_goes_on_where_it_ended(tmp_path, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    lines = 12
    killed_after(before, lines, 0, "parent", ("ceilings", "gemm"))
    _, entries = record.read(before)
    done = [e["part"] for e in entries if e["kind"] == "done"]
    assert main(after, "--resume", str(before), "--only", "ceilings", "gemm", "kernels") == 0
    stored = json.loads((after / "gpu.json").read_text())
    assert set(stored["done"]) == {"ceilings", "gemm", "kernels"}
    # What was done then was not run again: the very same times.
    spans = {(r["part"], r["what"]): r["span"] for r in stored["rows"]}
    for entry in entries:
        if entry["kind"] == "row" and entry["part"] in done:
            assert spans[entry["part"], entry["what"]] == entry["span"]
    assert "ceilings" in done
    # What is measured now has its share of what was measured then.
    assert all(row["share"] for row in stored["rows"] if row["part"] == "kernels")
    # A second time, in place: there is nothing left to do.
    capsys.readouterr()
    assert gpu.main(["--smoke", "--resume", str(after), "--only", "gemm"]) == 0
    again = json.loads((after / "gpu.json").read_text())
    assert again["rows"] == stored["rows"]
    assert "rows are taken over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"sources": {"commit": "a" * 40, "hash": "b"}}, {"smoke": False}, {"machine": {}}]
)
def test_rows_of_another_kind_are_not_taken_over(tmp_path, capsys, change):
    assert main(tmp_path, "--only", "ceilings") == 0
    header, entries = record.read(tmp_path)
    Record(tmp_path, {**header, **change}, entries).close()
    capsys.readouterr()
    assert main(tmp_path, "--resume", str(tmp_path), "--only", "kernels") == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in stored["rows"]} == {"kernels"}
    assert "nothing is taken over" in capsys.readouterr().err
    # They are not lost.
    assert "ceilings" in (tmp_path / record.OLDER).read_text()


def test_a_copy_without_history_is_of_the_same_sources():
    ours = {"sources": {"commit": "a" * 40, "hash": "b"}}
    assert record.differences(ours, {"sources": {"commit": None, "hash": "b"}}) == []
    assert record.differences(ours, {"sources": {"commit": "c" * 40, "hash": "b"}}) == [
        f"commit was {'c' * 40}, is {'a' * 40}"
    ]
    assert record.differences(ours, {"sources": {"commit": "a" * 40, "hash": "d"}}) == [
        "hash was d, is b"
    ]


def test_a_changed_file_is_another_source(tmp_path):
    (tmp_path / "krea2_srt").mkdir()
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "krea2_srt" / "a.py"
    file.write_text("1")
    before = sources(tmp_path)
    assert sources(tmp_path) == before
    file.write_text("2")
    assert sources(tmp_path) != before


def test_a_budget_skips_and_says_so(tmp_path):
    assert main(tmp_path, "--only", "ceilings", "compile", "--budget-s", "60") == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["done"] == ["ceilings"]
    page = (tmp_path / "gpu.md").read_text()
    assert "## What there was no time for\n\n- compile: takes about 10" in page


def test_the_output_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--smoke", "--only", "ceilings"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "gpu.json",
        "gpu.md",
        record.NAME,
    }


def test_only_children_touch_cuda(tmp_path, monkeypatch, capsys):
    """After a fork of a process that has asked CUDA anything, CUDA is lost."""
    parent, asked = os.getpid(), []

    def guarded(name: str) -> Callable:
        original = getattr(torch._C, name)

        def call(*args):
            if os.getpid() == parent:
                asked.append(name)
            return original(*args)

        return call

    for name in ("_cuda_getDeviceCount", "_cuda_init"):
        monkeypatch.setattr(torch._C, name, guarded(name))
    if not torch.cuda.is_available():
        asked.clear()
        with pytest.raises(SystemExit):
            gpu.main(["--output", str(tmp_path)])
    assert main(tmp_path, "--only", "ceilings") == 0
    assert asked == []


def test_clocks_stand_beside_rows(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho '1980, 2619, 650.5'\necho '[N/A], 2619, 650'\nprintf '1755, 26'\n"
        "sleep 0.2\necho '19, 700.0'\nexec sleep 60\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    now = [0.0]
    sampler = ClockSampler(str(tool), lambda: now[0])
    try:

        def two_samples() -> bool:
            now[0] = 10.0 * (1 + len(sampler._samples))
            sampler.read()
            return len(sampler._samples) == 2

        wait_until(two_samples)
        assert sampler.between((5.0, 15.0)) == Clocks(1980, 2619, 650.5)
        assert sampler.between((15.0, 25.0)) == Clocks(1755, 2619, 700)
        assert sampler.between((0.0, 30.0)) == Clocks(1867.5, 2619, 675.25)
        # Shorter than the time between two samples: the last one.
        assert sampler.between((21.0, 21.1)) == Clocks(1755, 2619, 700)
        assert sampler.between((1.0, 2.0)) is None
    finally:
        sampler.close()
    assert ClockSampler(None).between(None) is None


def test_what_does_not_run_here_is_no_failure(tmp_path):
    assert main(tmp_path, "--only", "attention") == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert ("cudnn", LEFT_OUT) in {(m["what"], m["why"]) for m in stored["missing"]}
