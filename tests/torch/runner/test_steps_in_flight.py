"""Steps that run on a GPU while the host prepares the next one."""

import pytest
import torch

import tests.torch.interpreted_triton  # noqa: F401 (first)
from krea2_srt.engine.work import PackStep
from krea2_srt.errors import DeviceLostError
from krea2_srt.runner import steps_in_flight
from krea2_srt.runner.steps_in_flight import LEAD_MS, StepsInFlight
from tests.comparisons import CPU
from tests.torch.cuda_rules import cuda_rules

CUDA = torch.device("cuda", 0)
KERNELS = 100
"""Kernels of a step."""


class Sequence:
    """As much of one as matters here."""

    def __init__(self, *tokens):
        self.tokens = tokens


def pack(*sequences, total_blocks=4):
    return PackStep(sequences, total_blocks, total_blocks)


class Device:
    """A GPU whose steps take a time, and the host's clock, which runs while it sleeps or waits."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0
        self.slept = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = max(device.now, device.free)

            def query(self):
                return device.now >= self.at

            def synchronize(self):
                device.now = max(device.now, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        def sleep(seconds):
            self.now += seconds
            self.slept += seconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(steps_in_flight.time, "sleep", sleep)

    def step(self, flights, step, ms, blocks=range(4), launch_ms=0.0):
        began = flights.begin()
        for _ in range(KERNELS):  # the device begins with the first while others are launched
            self.now += launch_ms / 1e3 / KERNELS
            self.free = max(self.now, self.free) + ms / 1e3 / KERNELS
        return flights.launched(step, blocks, None, began)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def flights(device):
    return StepsInFlight(CUDA, lambda: device.now)


def test_on_a_cpu_a_step_is_told_at_once():
    flights = StepsInFlight(CPU)
    guided, plain = Sequence(70, 80), Sequence(50)
    step = pack(guided, plain)
    # One flag per branch: that of a negative prompt alone says nothing.
    flags = torch.tensor([0, 1, 1], dtype=torch.int32)
    (result,) = flights.launched(step, range(4), flags, flights.begin())
    assert (result.step, result.blocks, result.ms) == (step, range(4), None)
    assert result.non_finite == (plain,)
    (slice_,) = flights.launched(step, range(2), None, flights.begin())
    assert slice_.non_finite == ()
    assert not flights.settle()


def test_a_known_step_is_told_while_the_next_one_runs(device, flights):
    steps = [pack(Sequence(100)) for _ in range(4)]
    told = [[r.step for r in device.step(flights, step, 20)] for step in steps]
    assert told == [[steps[0]], [], [steps[1]], [steps[2]]]
    assert [(r.step, r.ms) for r in flights.settle()] == [(steps[3], pytest.approx(20))]
    assert not flights.settle()


def test_the_device_never_waits_and_a_new_request_waits_for_little_more_than_what_runs(
    device, flights
):
    step = pack(Sequence(100))
    for number in range(10):
        launched = device.now
        device.step(flights, step, 150)
        if number > 1:
            assert device.free - launched == pytest.approx(0.150 + LEAD_MS / 1e3, abs=2e-3)
    assert device.free == pytest.approx(10 * 0.150, abs=1e-6)


@pytest.mark.parametrize(("launch_ms", "ms"), [(3, 40), (6, 40), (10, 165), (15, 20)])
def test_the_device_never_waits_for_launches_that_take_long(device, flights, launch_ms, ms):
    step = pack(Sequence(100))
    for number in range(10):
        before = device.free
        device.step(flights, step, ms, launch_ms=launch_ms)
        if number > 1:
            assert device.free - before == pytest.approx(ms / 1e3, abs=1e-4)


def test_a_step_that_takes_longer_than_it_did_does_not_run_two_ahead(device, flights):
    step = pack(Sequence(100))
    for ms in (10, 10, 10, 80, 10):
        device.step(flights, step, ms)
        assert len(flights) <= 1
    assert [r.ms for r in flights.settle()] == [pytest.approx(10)]


def test_a_step_that_takes_less_than_it_did_ends_the_wait(device, flights):
    step = pack(Sequence(100))
    for ms in (150, 150, 20):
        device.step(flights, step, ms)
    before = device.now
    device.step(flights, step, 20)
    assert device.now - before < 0.05


def test_a_decode_beside_it_is_no_time_of_a_step(device, flights):
    """Events tell when the device began and ended, whatever the host has done meanwhile."""
    step = pack(Sequence(100))
    device.step(flights, step, 20)
    device.step(flights, step, 20)
    device.now += 5.0
    assert [r.ms for r in flights.settle()] == [pytest.approx(20)]


def test_those_of_a_sequence_are_settled_with_those_before_them(device, flights):
    mine, other = Sequence(100), Sequence(100)
    for step in (pack(mine), pack(other)):
        device.step(flights, step, 1)
    device.step(flights, pack(mine), 1)
    assert not flights.settle(other)  # told by the call after it
    assert [r.step.sequences for r in flights.settle(mine)] == [(mine,)]


@pytest.mark.parametrize("method", ["synchronize", "query"])
def test_a_fault_of_an_earlier_kernel_is_nobodys_own(device, flights, monkeypatch, method):
    step = pack(Sequence(100))
    for _ in range(2):
        device.step(flights, step, 100)

    def fail(event):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda.Event, method, fail)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        device.step(flights, step, 100)


def test_flags_are_read_a_step_later_without_a_wait_of_their_own():
    with cuda_rules() as cuda, torch.inference_mode():
        cuda.read = lambda tensor, number: 1
        flights = StepsInFlight(torch.device("cuda", 0))
        step, flags = pack(Sequence(100)), torch.zeros(1, dtype=torch.int32, device="cuda")
        results = []
        for _ in range(4):
            began = flights.begin()
            flags.add_(1)  # as a graph does, in the same place
            results += flights.launched(step, range(4), flags, began)
        assert len(results) == 3
        results += flights.settle()
        assert [r.non_finite for r in results] == [step.sequences] * 4
        assert all(r.ms > 0 for r in results)
        assert set(cuda.waits) == {"synchronize of an event"}
