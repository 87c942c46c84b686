"""What scheduling itself costs: the turn of an engine whose device takes no time.

Counted, as times are other programs' too; the times are in `make bench-check`.
"""

import sys
from collections.abc import Callable
from types import FrameType

import pytest

from krea2_bench.micro.scheduling import (
    ACTIVE,
    PACKS_PAY,
    TURNS,
    WAITING,
    busy_engine,
    num_unfinished,
)
from tests.unit.engine.fakes import H200


def instructions(work: Callable[[], object]) -> int:
    """How many of Python's instructions some work is."""
    number = 0

    def count(frame: FrameType, event: str, _: object) -> Callable:
        nonlocal number
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        number += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return number


@pytest.mark.parametrize(
    ("cost", "images_each", "limit"),
    [
        pytest.param(H200, 1, 17_000, id="alone, 64 requests"),
        pytest.param(H200, ACTIVE, 24_000, id="alone, one request of 64"),
        pytest.param(PACKS_PAY, 1, 43_000, id="packs, 64 requests"),
        pytest.param(PACKS_PAY, ACTIVE, 34_500, id="packs, one request of 64"),
    ],
)
def test_scheduling_a_turn_costs_little(cost, images_each, limit):
    """A quarter more than when this was written; 3.12 counts other instructions than 3.11."""
    engine = busy_engine(cost, images_each)
    found = [instructions(engine.turn) for _ in range(TURNS)]
    counted = engine.statistics()
    assert (num_unfinished(engine), counted["waiting"]) == (ACTIVE, WAITING)
    # Where packs do not pay, the images of a request follow one another.
    begun = 1 if cost is H200 and images_each == ACTIVE else ACTIVE
    assert counted["active_sequences"] == begun
    assert counted["steps"] > counted["packs"] * (32 if cost is PACKS_PAY else 0)
    assert max(found) <= limit


def test_instructions_are_counted():
    def loop(times: int) -> None:
        for _ in range(times):
            pass

    once, twice = instructions(lambda: loop(1000)), instructions(lambda: loop(2000))
    assert twice - once >= 1000
