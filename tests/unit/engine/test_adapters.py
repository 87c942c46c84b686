"""Adapters need room on the device: who waits for it, and who does not."""

import pytest

from krea2_srt.engine.lifecycle import State
from krea2_srt.errors import RequestError
from krea2_srt.request import AdapterUse
from tests.unit.engine.fakes import Harness


def using(*names: str) -> dict[str, object]:
    return {"adapters": frozenset(AdapterUse(name, name) for name in names)}


def begun(*requests) -> list[bool]:
    return [request.state is not State.WAITING for request in requests]


def test_nine_adapters_on_eight_places_all_get_theirs():
    harness = Harness(max_adapters=8)
    requests = [harness.submit(1024, **using(name)) for name in "abcdefghi"]
    while not all(begun(*requests[:8])):
        harness.turn()
    assert not requests[8].ended
    assert begun(requests[8]) == [False]
    harness.run()
    assert {request.state for request in requests} == {State.DONE}
    harness.check_empty()


def test_requests_without_adapters_pass_those_that_wait_for_room():
    harness = Harness(max_adapters=1)
    first, second = (harness.submit(1024, 20, **using(name)) for name in "ab")
    base = harness.submit(1024)
    harness.run_until(base)
    assert begun(first, second) == [True, False]
    harness.run()
    harness.check_empty()


def test_who_waits_for_room_is_not_passed_for_ever():
    harness = Harness(max_adapters=1)
    harness.submit(256, **using("a"))
    harness.turn()
    waits = harness.submit(256, **using("b"))
    for _ in range(200):
        harness.submit(256, **using("a"))
        harness.turn()
    assert waits.ended, "a stream of requests with the one that is there holds it up"
    harness.run()
    harness.check_empty()


def test_one_that_is_there_already_needs_no_room():
    harness = Harness(max_adapters=1)
    requests = [harness.submit(512, 20, **using("a")) for _ in range(4)]
    while not all(begun(*requests)):
        harness.turn()
    assert not any(request.ended for request in requests)
    harness.run()


def test_a_cancelled_one_makes_way_for_those_behind_it():
    harness = Harness(max_adapters=2)
    first = harness.submit(1024, 50, **using("a"))
    harness.turn()
    two = harness.submit(1024, **using("b", "c"))
    harness.turns(3)
    one = harness.submit(1024, **using("b"))
    harness.turns(3)
    assert begun(two, one) == [False, False]
    harness.cancel(two)
    harness.run_until(one)
    assert not first.ended
    harness.run()
    harness.check_empty()


def test_more_than_the_device_ever_has_room_for_is_refused():
    harness = Harness(max_adapters=2)
    with pytest.raises(RequestError, match="adapters: need more memory together than the device"):
        harness.submit(256, **using("a", "b", "c"))
    assert harness.engine.statistics()["refused"] == 1
    harness.check_empty()
