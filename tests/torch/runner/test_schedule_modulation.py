"""Rows of modulation, remembered one by one."""

import pytest
import torch

from krea2_srt.model.schedule import flow_schedule
from krea2_srt.runner.byte_cache import ByteCache
from krea2_srt.runner.schedule_modulation import ScheduleModulation
from tests.torch.runner.test_pictures import start

ROWS = 5


@pytest.fixture
def made(runner):
    """Schedules whose rows were computed, in order, and a function that computes them."""
    schedules = []

    @torch.inference_mode()
    def make(schedule):
        schedules.append(schedule)
        return runner.dit.modulation(torch.tensor(schedule.timesteps))

    return schedules, make


@pytest.fixture
def row_bytes(runner):
    with torch.inference_mode():
        return runner.dit.modulation(torch.ones(1)).nbytes


def same(row, whole, step):
    return all(torch.equal(a, b) for a, b in zip(row.tensors, whole.row(step).tensors, strict=True))


@pytest.mark.parametrize("capacity", [0, 1, 3, 2 * ROWS])
def test_rows_are_those_of_the_whole_schedule_however_little_is_remembered(
    made, row_bytes, capacity
):
    schedules, make = made
    schedule = flow_schedule(ROWS, 1.15)
    whole = make(schedule)
    rows = ByteCache(capacity * row_bytes)
    modulation = ScheduleModulation(schedule, rows, make)
    assert all(same(modulation.row(step), whole, step) for step in range(ROWS))
    assert rows.num_bytes <= capacity * row_bytes
    if capacity >= ROWS:
        assert len(schedules) == 2, "computed more than once"


def test_a_remembered_row_keeps_no_other_alive(made, row_bytes):
    _, make = made
    row = ScheduleModulation(flow_schedule(ROWS, 1.15), ByteCache(0), make).row(2)
    assert sum(tensor.untyped_storage().nbytes() for tensor in row.tensors) == row_bytes


def test_sequences_of_many_sizes_hold_no_modulation(runner, row_bytes, monkeypatch):
    """Raw's schedule is another one for each size; all of them may have begun."""
    monkeypatch.setattr(runner, "_modulations", ByteCache(3 * row_bytes))
    monkeypatch.setattr(
        runner, "schedule", lambda steps, width, height, mu=None: flow_schedule(steps, width / 64)
    )
    sequences = [start(runner, "x", 16 * n, 32, ROWS, n) for n in range(1, 7)]
    for _ in range(2):
        assert runner.step(sequences) == []
        assert runner._modulations.num_bytes <= 3 * row_bytes
    alone = start(runner, "x", 16, 32, ROWS, 1)
    for _ in range(2):
        runner.step([alone])
    assert torch.allclose(sequences[0].tokens, alone.tokens, atol=1e-4)
