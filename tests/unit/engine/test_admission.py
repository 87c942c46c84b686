import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.errors import DrainingError, QueueFullError, RequestError
from tests.unit.engine.fakes import Harness, image

W_1024 = (8 * 143.03 + 24.89 + 2.51) / 1e3
"""Seconds of work of a 1024 x 1024 image of 8 steps."""


def test_work_is_taken_up_to_the_limit_and_refused_beyond_it():
    harness = Harness(EngineConfig(max_queue_s=10.0))
    accepted = 0
    with pytest.raises(QueueFullError):
        while True:
            harness.submit(1024)
            accepted += 1
    assert accepted == int(10.0 / W_1024)
    counters = harness.engine.counters
    assert (counters.accepted, counters.refused) == (accepted, 1)
    assert harness.engine.outstanding_ms / 1e3 <= 10.0
    harness.run()
    harness.check_empty()


def test_a_smaller_request_still_fits_where_a_larger_one_is_refused():
    harness = Harness(EngineConfig(max_queue_s=1.5))
    harness.submit(1024)
    with pytest.raises(QueueFullError):
        harness.submit(1024)
    harness.submit(256)


def test_a_refused_request_is_taken_when_it_said_so_and_not_much_before():
    harness = Harness(EngineConfig(max_queue_s=5.0))
    for _ in range(4):
        harness.submit(1024)
    with pytest.raises(QueueFullError) as refusal:
        harness.submit(1024)
    retry_after_s = refusal.value.retry_after_s
    assert retry_after_s == pytest.approx(5 * W_1024 - 5.0, abs=0.02)
    assert str(refusal.value) == (
        f"{4 * W_1024:.1f} s of work are queued, the limit is 5 s; "
        f"retry after {retry_after_s:.1f} s"
    )
    harness.run(until=retry_after_s - 0.2)
    with pytest.raises(QueueFullError):
        harness.submit(1024)
    harness.run(until=retry_after_s)
    harness.submit(1024)


def test_an_empty_engine_takes_anything():
    harness = Harness(EngineConfig(max_queue_s=0.001))
    harness.submit(2048, steps=50, num_images=8)
    with pytest.raises(QueueFullError) as refusal:
        harness.submit(16, steps=1)
    # Not the whole excess: it is enough to wait until the engine is empty.
    assert refusal.value.retry_after_s == pytest.approx(harness.engine.outstanding_ms / 1e3)
    harness.run()
    assert harness.clock.now == pytest.approx(refusal.value.retry_after_s, rel=0.01)
    harness.submit(2048, steps=50, num_images=8)


def test_a_refused_request_leaves_nothing_behind():
    harness = Harness(EngineConfig(max_queue_s=1.0))
    harness.submit(1024)
    before = harness.engine.statistics()
    with pytest.raises(QueueFullError):
        harness.submit(1024, request_id="again", deadline_s=1.0)
    assert harness.engine.statistics() == before | {"refused": 1}
    harness.run()
    harness.submit(1024, request_id="again")


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing():
    harness = Harness()
    running, waiting = harness.submit(1024), harness.submit(1024)
    harness.turns(3)
    assert not harness.engine.draining
    harness.engine.drain()
    assert harness.engine.draining
    with pytest.raises(DrainingError, match="shutting down"):
        harness.submit(256)
    harness.run()
    assert running.error is waiting.error is None
    assert harness.engine.counters.done == 2
    with pytest.raises(DrainingError):
        harness.submit(256)
    harness.check_empty()
    assert harness.engine.counters.refused == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"size": 100}, "width"),
        ({"steps": 0}, "steps"),
        ({"num_images": 65}, "num_images"),
        ({"images": [image(num_images=40), image(num_images=40)]}, "num_images"),
        ({"images": [image(num_images=2), image(num_images=-1)]}, "num_images"),
        ({"images": [image(num_images="4")]}, "num_images"),
        ({"images": [image(num_images=None)]}, "num_images"),
        ({"images": [image(), image(guidance=-1.0)]}, "guidance"),
        ({"priority": 11}, "priority"),
        ({"priority": -11}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": 1e9}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"request_id": "taken"}, "request_id"),
    ],
)
def test_an_impossible_request_is_refused_with_its_field(fields, field):
    harness = Harness()
    harness.submit(256, request_id="taken")
    before = harness.engine.statistics()
    with pytest.raises(RequestError) as error:
        harness.submit(**fields)
    assert error.value.field == field
    assert harness.engine.statistics() == before | {"refused": 1}


def test_a_request_needs_an_image():
    with pytest.raises(RequestError, match="num_images: must be between 1 and 64, got 0"):
        Harness().engine.submit("r", [])


def test_the_id_of_a_request_that_has_ended_is_free_again():
    harness = Harness()
    harness.submit(256, request_id="a")
    harness.run()
    assert harness.engine.submit("a", [image()]).id == "a"


def test_cancelling_what_is_not_there_is_no_error():
    harness = Harness()
    assert harness.engine.cancel("nobody") == []
    assert harness.engine.turn() is None
