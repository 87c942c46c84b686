"""Expandable segments, where nobody has decided otherwise and the GPU can."""

import pytest
import torch

from krea2_srt.runner.allocator import SETTINGS, use_expandable_segments
from tests.comparisons import CPU

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What torch's allocator was told."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    return found


def test_a_gpus_segments_grow(asked):
    use_expandable_segments(GPU)
    assert asked == ["expandable_segments:True"]


@pytest.mark.parametrize("name", SETTINGS)
def test_who_sets_the_allocator_has_decided(asked, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments(GPU)
    assert asked == []


def test_a_cpu_has_none(asked):
    use_expandable_segments(CPU)
    assert asked == []


def test_a_gpu_that_cannot_goes_without(asked, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("CUDA driver error: operation not supported\nand more")

    monkeypatch.setattr(torch, "empty", fail)
    with caplog.at_level("INFO"):
        use_expandable_segments(GPU)
    assert asked == ["expandable_segments:True", "expandable_segments:False"]
    (record,) = caplog.records
    assert record.getMessage().endswith("operation not supported")


def test_a_full_gpu_is_not_one_that_cannot(asked, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(torch.OutOfMemoryError):
        use_expandable_segments(GPU)
    assert asked == ["expandable_segments:True"]


def test_torch_takes_what_it_is_told():
    """On a machine without a GPU too: the setting is only read when memory is taken."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
