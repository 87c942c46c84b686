"""Loading beside a reader that is ahead of it, on a disk that hands over as much as it is told."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from krea2_srt import read_ahead
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.on_disk import part_files
from krea2_srt.model.stored.files import PlainTensor
from krea2_srt.model.vae_files import load_vae
from krea2_srt.read_ahead import ReadAhead
from tests.comparisons import CPU
from tests.throttled_disk import UNLIMITED, ThrottledDisk

PIECE = 100_000


@pytest.fixture
def files(demo_model: Path) -> list[Path]:
    """In the order of loading."""
    return part_files({part: demo_model / part for part in ("transformer", "vae")})


def load(demo_model: Path) -> list[torch.nn.Module]:
    transformer = load_dit(demo_model / "transformer", CPU, torch.float32)
    return [transformer, load_vae(demo_model / "vae", CPU, torch.float32)]


@pytest.fixture
def touched(monkeypatch) -> list[tuple[Path, int, int]]:
    """File and end of each tensor that the loader reads, and how much has been read ahead then."""
    found = []
    read = PlainTensor.read

    def recorded(tensor: PlainTensor) -> torch.Tensor:
        file, end = tensor.extent.file, tensor.extent.end
        ahead = read_ahead._current
        found.append((file, end, ahead._files[ahead._index_of(file)].read))
        return read(tensor)

    monkeypatch.setattr(PlainTensor, "read", recorded)
    return found


@pytest.fixture
def begin(monkeypatch, files):
    """Begins to read ahead from a disk, at most 300 KB before the loader."""

    def begun(disk) -> None:
        limit = 3 * PIECE
        made = ReadAhead(files, read=disk, limit=lambda: limit)
        monkeypatch.setattr(read_ahead, "ReadAhead", lambda files: made)
        read_ahead.begin(files)

    yield begun
    read_ahead.finish()


def test_no_tensor_is_touched_before_it_has_been_read(demo_model, files, touched, begin):
    disk = ThrottledDisk(UNLIMITED, PIECE)
    begin(disk)
    load(demo_model)
    assert {file for file, _, _ in touched} == set(files)
    for file, end, read in touched:
        assert read >= end, file
    assert touched == sorted(touched, key=lambda one: (files.index(one[0]), one[1]))
    # From begin to end, each byte once.
    assert len(disk.reads) > 20
    for file in files:
        reads = [one for one in disk.reads if one[0] == file.stat().st_ino]
        assert reads[0][1] == 0
        assert all(one[2] == other[1] for one, other in pairwise(reads))


def test_a_reader_that_fails_changes_nothing(demo_model, begin):
    expected = [part.state_dict() for part in load(demo_model)]

    def broken(descriptor: int, start: int, count: int) -> int:
        if start >= PIECE:
            raise OSError("input/output error")
        return min(count, PIECE)

    begin(broken)
    for part, weights in zip(load(demo_model), expected, strict=True):
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    assert read_ahead.finish().bytes_read == PIECE
