"""Starts from a slow disk: the rate that is kept, the large checkpoint, and the table."""

import json
import os
from types import SimpleNamespace

import pytest

from krea2_bench.cold_start import __main__ as command
from krea2_bench.cold_start import worker
from krea2_bench.cold_start.__main__ import _READY, Start, drop_from_memory, table
from krea2_bench.cold_start.worker import Throttled
from krea2_srt.read_ahead import ReadAheadReport
from krea2_srt.start_up import StartUp


class Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    return clock


def test_a_throttled_disk_keeps_its_rate(clock, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1_000_000))
    descriptor = os.open(file, os.O_RDONLY)
    read, at = Throttled(100_000), 0
    while done := read(descriptor, at, 10**9):
        at += done
    os.close(descriptor)
    assert at == 1_000_000
    assert clock.now == pytest.approx(110, abs=0.1)


def test_time_in_which_nobody_reads_is_lost(clock, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1_000_000))
    descriptor = os.open(file, os.O_RDONLY)
    read = Throttled(100_000)
    read(descriptor, 0, 10**9)
    clock.sleep(60)
    before, at = clock.now, 0
    while at < 100_000:
        at += read(descriptor, at, 10**9)
    os.close(descriptor)
    assert clock.now - before == pytest.approx(1, abs=0.05)


def test_what_has_been_dropped_is_still_there(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    drop_from_memory(file)
    assert file.read_bytes() == b"weights"


def test_the_engines_own_account_is_understood():
    text = StartUp(31.0, 40.0, ReadAheadReport(2 * 10**9, 20.0, 1.5)).text(43.25)
    found = _READY.search(f"[11-30 09:35:29] krea2-srt: {text}")
    assert found.groups() == ("43.2", "31.0", "9.0", "1.5", "3.2", "2.00", "20.0")


RUN = {"command": "x", "date": "2026-01-01T00", "cpu": "a CPU", "cpu_count": 2, "load_average": 0.5}


def results(*starts: Start) -> dict:
    return {"run": RUN, "size_gb": 2.0, "starts": [vars(each) for each in starts]}


def test_a_row_for_each_disk_and_reading():
    early = [Start(100, "early", ready, 15, 2, 0.5, 1, 2, 20, 2.02) for ready in (22, 23.5, 21)]
    page = table(results(*early, Start(0, "none", 40, 15, 24, 0, 1, 0, 0, 2.2)))
    for row in (
        "| 100 MB/s | early | 15.0 | 20.0 | 2.0 | 0.5 | 1.0 | 22.0 | 2.0 (1.0 to 3.5) | 1.01 |",
        "| its own rate | none | 15.0 | 0.0 | 24.0 | 0.0 | 1.0 | 40.0 | 25.0 (25.0 to 25.0) | 1.1",
    ):
        assert row in page


def test_each_disk_is_read_in_each_way_in_each_round(tmp_path, monkeypatch, capsys):
    asked = []

    def start(folder, checkpoint, rate, reading):
        assert json.loads((checkpoint / "model_index.json").read_text())
        asked.append((rate, reading))
        return Start(rate, reading, 1, 1, 1, 1, 1, 1, 1, 1)

    def write(source, folder, gigabytes):
        folder.mkdir()
        (folder / "model_index.json").write_text('{"_class_name": "Krea2Pipeline"}')
        (folder / "transformer").mkdir()
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(bytes(10**7))

    monkeypatch.setattr(command, "start", start)
    monkeypatch.setattr(command, "write_large_checkpoint", write)
    argv = ["--model", str(tmp_path), "--output", str(tmp_path), "--rounds", "2"]
    assert command.main([*argv, "--rates", "50,0"]) == 0
    # A first one that is not counted. Page faults know no rate, so there is no "none" at 50 MB/s.
    once = [(50, "early"), (50, "late"), (0, "early"), (0, "late"), (0, "none")]
    assert asked == [(0, "early"), *once, *once]
    written = json.loads((tmp_path / "cold_start.json").read_text())
    assert len(written["starts"]) == 10
    assert (tmp_path / "cold_start.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"


@pytest.mark.parametrize(("reading", "early"), [("early", 1), ("late", 0), ("none", 0)])
def test_a_reading_changes_when_the_worker_begins(reading, early, monkeypatch):
    begun = []
    stand_in = SimpleNamespace(begin_for=begun.append)
    stand_in.main = lambda options: stand_in.begin_for(options)
    ahead = SimpleNamespace()
    monkeypatch.setattr(worker, "worker", stand_in)
    monkeypatch.setattr(worker, "read_ahead", ahead)
    worker.main(["100", reading, "--model-path", "m"])
    assert begun == [["--model-path", "m"]] * early
    assert bool(ahead.ReadAhead([command.__file__])._files) == (reading != "none")


@pytest.mark.slow
def test_the_large_checkpoint_is_large_where_told(demo_model, tmp_path):
    import torch

    from krea2_bench.cold_start.checkpoint import write_large_checkpoint
    from krea2_srt.model.on_disk import weight_files
    from krea2_srt.model.text_encoder import load_text_encoder
    from tests.comparisons import CPU

    write_large_checkpoint(demo_model, tmp_path / "large", 0.03)
    before, after = (
        [file.stat().st_size for file in weight_files(str(folder))]
        for folder in (demo_model, tmp_path / "large")
    )
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert after[1] - before[1] == pytest.approx(0.03e9, rel=0.1)
    folder = tmp_path / "large"
    load_text_encoder(folder / "text_encoder", folder / "tokenizer", (0, 35), CPU, torch.bfloat16)
