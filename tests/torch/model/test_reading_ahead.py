"""Loading beside a reader that is ahead of it, on a disk that hands over as much as it is told."""

from pathlib import Path

import pytest
import torch

from krea2_srt import read_ahead
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.on_disk import weight_files
from krea2_srt.model.stored.files import PlainTensor
from krea2_srt.read_ahead import ReadAhead
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU
from tests.throttled_disk import UNLIMITED, ThrottledDisk

PIECE = 100_000


@pytest.fixture
def touched(monkeypatch) -> list[tuple[Path, int, int]]:
    """File and end of each tensor that the loader reads, and how much has been read ahead then."""
    found = []
    read = PlainTensor.read

    def recorded(tensor: PlainTensor) -> torch.Tensor:
        file, end = tensor.extent.file, tensor.extent.end
        ahead = read_ahead._current
        place = ahead._index_of(file)
        found.append((file, end, ahead._files[place].read))
        return read(tensor)

    monkeypatch.setattr(PlainTensor, "read", recorded)
    return found


@pytest.fixture
def disk(monkeypatch) -> ThrottledDisk:
    """What this process's reading ahead reads from; at most 300 KB before the loader."""
    disk = ThrottledDisk(UNLIMITED, PIECE)
    monkeypatch.setattr(
        read_ahead, "ReadAhead", lambda files: ReadAhead(files, read=disk, limit=lambda: 3 * PIECE)
    )
    yield disk
    read_ahead.finish()


def test_no_tensor_is_touched_before_it_has_been_read(demo_model, disk, touched):
    files = weight_files(str(demo_model))
    read_ahead.begin(files)
    Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    assert {file for file, _, _ in touched} == set(files)
    for file, end, read in touched:
        assert read >= end, file
    # From begin to end, each byte once.
    assert disk.order(files) == [file.name for file in files]
    for file in files:
        read = [one for one in disk.reads if one[0] == file.stat().st_ino]
        assert read[0][1] == 0
        assert all(one[2] == other[1] for one, other in zip(read, read[1:], strict=False))


def test_the_loader_asks_in_the_order_of_the_file(demo_model, disk, touched):
    read_ahead.begin(weight_files(str(demo_model)))
    Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    files = list(dict.fromkeys(file for file, _, _ in touched))
    assert touched == sorted(touched, key=lambda one: (files.index(one[0]), one[1]))


def test_a_builder_reads_ahead_whoever_has_begun(demo_model, disk, touched):
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    types = (torch.float32,) * 3
    runner = RunnerBuilder(checkpoint, CPU, *types).load(None)
    assert all(read >= end for _, end, read in touched)
    start_up = runner.start_up
    assert start_up.ahead.bytes_read == sum(end - start for _, start, end in disk.reads)
    assert 0 < start_up.imported_s <= start_up.loaded_s
    assert read_ahead._current is None


def test_a_reader_that_fails_changes_nothing(demo_model, monkeypatch, runner):
    def broken(descriptor: int, start: int, count: int) -> int:
        if start >= PIECE:
            raise OSError("input/output error")
        return min(count, PIECE)

    monkeypatch.setattr(read_ahead, "ReadAhead", lambda files: ReadAhead(files, read=broken))
    read_ahead.begin(weight_files(str(demo_model)))
    loaded = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    read_ahead.finish()
    expected = runner.dit.state_dict()
    for name, tensor in loaded.dit.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
