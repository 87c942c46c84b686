"""Every request ends in one answer, whatever fails around it and whoever has gone."""

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from krea2_srt.engine.lifecycle import State
from krea2_srt.errors import Krea2Error
from krea2_srt.request import ImageRequest, RequestLimits
from tests.unit.engine.fakes import Harness

CLIENT = b"client"


class RecordedExchange:
    """An exchange that fails where it is told to."""

    ASLEEP = "asleep"
    priority, deadline_s, request_id, identity = 0, None, "id", CLIENT
    adapters, held = frozenset(), None

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.answers: list[str] = []

    def _do(self, what: str) -> None:
        if what == self.failing:
            raise ValueError("/a/secret/path")

    def images(self, limits):
        self._do("images")
        return [ImageRequest("x", 64, 64, 2)]

    def accepted(self, request):
        self._do("accepted")

    def started(self):
        self._do("started")

    def progress(self, event):
        self._do("progress")

    def failed(self, error):
        assert self.failing == "images" or isinstance(error, Krea2Error)
        assert self.failing == "images" or "secret" not in str(error)
        self.answers.append("failed")

    def abandoned(self, error):
        self.answers.append("abandoned")

    def finished(self, request, pixels):
        self._do("finished")
        self.answers.append("finished")
        return Future()


@pytest.fixture
def scheduler():
    """What handles exchanges, around a real engine on a fake executor."""
    from krea2_srt.sglang.scheduler import Krea2Scheduler
    from krea2_srt.sglang.served_adapters import ServedAdapters

    harness = Harness()
    harness.executor.take_pixels = lambda sequence: None
    scheduler = Krea2Scheduler.__new__(Krea2Scheduler)
    scheduler._engine, scheduler._executor = harness.engine, harness.executor
    scheduler._limits, scheduler._numbers = RequestLimits(), iter(range(9))
    scheduler._exchanges, scheduler._inflight_finalizes = {}, deque()
    scheduler._adapters = ServedAdapters(None)
    scheduler._defaults = SimpleNamespace(of=lambda exchange: (frozenset(), None))
    scheduler.worker = SimpleNamespace(is_sleeping=lambda: False)
    return scheduler


def run(scheduler) -> None:
    while not scheduler._engine.idle:
        scheduler._handle(scheduler._engine.turn() or [])


@pytest.mark.parametrize(
    ("failing", "answer"),
    [
        ("", "finished"),
        ("images", "failed"),
        ("accepted", "failed"),
        ("started", "finished"),
        ("progress", "finished"),
        ("finished", "failed"),
    ],
)
def test_a_request_is_answered_once_wherever_something_fails(scheduler, failing, answer):
    exchange = RecordedExchange(failing)
    scheduler._submit(exchange)
    run(scheduler)
    assert exchange.answers == [answer]
    assert not scheduler._exchanges
    counters = scheduler._engine.counters
    assert counters.accepted == counters.done + counters.failed + counters.cancelled


def test_what_a_client_has_left_behind_is_given_up_and_not_answered(scheduler):
    exchange = RecordedExchange()
    scheduler._submit(exchange)
    scheduler.receiver = SimpleNamespace(pop_disconnected=lambda: {CLIENT})
    scheduler._cancel_lost()
    assert exchange.answers == ["abandoned"]
    assert scheduler._engine.idle


@pytest.mark.parametrize(("identity", "answer"), [(CLIENT, "abandoned"), (b"other", "failed")])
def test_who_cancels_its_own_request_has_stopped_listening(scheduler, identity, answer):
    from krea2_srt.messages import Cancel

    exchange = RecordedExchange()
    scheduler._submit(exchange)
    (request,) = scheduler._exchanges
    scheduler._cancel(identity, Cancel("id"))
    assert exchange.answers == [answer]
    assert request.state is State.CANCELLED


def test_sglangs_metrics_count_what_its_client_has_left_behind():
    from krea2_srt.errors import RequestCancelledError
    from krea2_srt.sglang.sglang_exchange import SglangExchange

    under_way = set()
    metrics = SimpleNamespace(enqueue=lambda key, **_: under_way.add(key))
    replies = SimpleNamespace(reply=lambda _, payload, output: under_way.remove(id(payload)))
    req = SimpleNamespace(request_id="x", is_warmup=False, metrics=None)
    exchange = SglangExchange(CLIENT, [req], [req], replies, None, metrics)
    assert under_way
    exchange.abandoned(RequestCancelledError("gone"))
    assert not under_way


@pytest.mark.parametrize(
    ("identity", "answer"), [(CLIENT, "abandoned"), (b"other", "failed"), (None, "abandoned")]
)
def test_who_waits_for_an_adapter_ends_as_others_do(scheduler, identity, answer):
    from krea2_srt.messages import Cancel

    exchange = RecordedExchange()
    scheduler._adapters.wait_for(lambda: False, lambda: None, exchange.failed, exchange)
    if identity is None:
        scheduler.receiver = SimpleNamespace(pop_disconnected=lambda: {CLIENT})
        scheduler._cancel_lost()
    else:
        scheduler._cancel(identity, Cancel(exchange.request_id))
    assert exchange.answers == [answer]
    assert not scheduler._adapters.waiting


def test_a_server_that_drains_waits_for_no_adapter(scheduler):
    exchange = RecordedExchange()
    scheduler._adapters.wait_for(lambda: False, lambda: None, exchange.failed, exchange)
    assert not scheduler._finished()
    scheduler._engine.drain()
    assert scheduler._finished()
    assert exchange.answers == ["failed"]
