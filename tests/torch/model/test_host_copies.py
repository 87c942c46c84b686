"""Small copies to the device, on fake CUDA tensors: each comes from pinned memory, unawaited."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from krea2_srt.model.host_copies import copy_to, to_device
from krea2_srt.model.pack import Segments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Copies(TorchDispatchMode):
    """Notes each copy to the device: whether the host waits, and whether it is from pinned memory.

    Fake tensors cannot be pinned, so those that `pinned` gives are remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []
        self.found: list[tuple[bool, bool]] = []

    def pin(self, tensor):
        pinned = tensor.clone()
        self.pinned.append(pinned)
        return pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs["device"].type == "cuda":
            self.note(args[0], kwargs.get("non_blocking", False))
        if function is torch.ops.aten.copy_.default and args[0].device.type == "cuda":
            self.note(args[1], len(args) > 2 and args[2])
        return function(*args, **kwargs)

    def note(self, source, unawaited):
        pinned = any(source is one for one in self.pinned)
        self.found.append((unawaited, pinned))


@pytest.fixture
def copies(monkeypatch):
    copies = Copies()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.pin(tensor))
    with FakeTensorMode(), copies:
        yield copies


def test_a_tensor_comes_to_the_device_pinned_and_unawaited(copies):
    assert to_device(torch.ones(3), CUDA).device.type == "cuda"
    copy_to(torch.zeros(3, device="cuda"), torch.ones(3))
    assert copies.found == [(True, True)] * 2


def test_an_ordinary_copy_would_be_noticed(copies):
    torch.ones(3).to("cuda")
    torch.zeros(3, device="cuda").copy_(torch.ones(3))
    assert copies.found == [(False, False)] * 2


def test_offsets_of_segments_are_not_waited_for(copies):
    assert Segments.of([3, 4], CUDA).cu_seqlens.device.type == "cuda"
    assert copies.found == [(True, True)]


def test_on_a_cpu_a_tensor_is_itself():
    tensor, place = torch.ones(3), torch.zeros(3)
    assert to_device(tensor, CPU) is tensor
    copy_to(place, tensor)
    assert torch.equal(place, tensor)
