"""A text encoder whose weights are on the host between uses."""

import pytest
import torch
from torch import nn

from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.offload import offload
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU

PROMPTS = ["a cat", "two dogs in the rain"]


def test_an_offloaded_encoder_gives_the_same_states(runner, demo_model):
    offloaded = Krea2Runner.load(
        Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32, text_encoder_resident=False
    )
    for _ in range(2):
        both = (r.text_encoder.encode(PROMPTS) for r in (offloaded, runner))
        for got, expected in zip(*both, strict=True):
            assert torch.equal(got, expected)


class Probe(nn.Module):
    """Notes where its weights are while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[int] = []
        self.fails = False

    def forward(self, x):
        self.seen.append(self.linear.weight.data_ptr())
        if self.fails:
            raise torch.OutOfMemoryError("no room")
        return self.linear(x)


def test_weights_are_on_the_device_only_while_their_module_runs():
    probes = [Probe(), Probe()]
    host = [probe.linear.weight.data_ptr() for probe in probes]
    expected = probes[1](probes[0](torch.ones(2, 3)))
    offload(probes, CPU)
    for _ in range(2):
        got = probes[1](probes[0](torch.ones(2, 3)))
        assert torch.equal(got, expected)
        assert [probe.linear.weight.data_ptr() for probe in probes] == host
    for probe, home in zip(probes, host, strict=True):
        assert home not in probe.seen[1:]


def test_weights_leave_the_device_when_their_module_fails():
    probe = Probe()
    host = probe.linear.weight.data_ptr()
    offload([probe], CPU)
    probe.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        probe(torch.ones(1, 3))
    assert probe.linear.weight.data_ptr() == host
    probe.fails = False
    probe(torch.ones(1, 3))
