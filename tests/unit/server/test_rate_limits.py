"""Requests a minute and at a time, by a clock that the test turns."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_server.errors import ApiError
from krea2_server.keys import Client
from krea2_server.middleware.rate_limits import BURST_S, RateLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def allowed(limits: RateLimits, client: Client) -> bool:
    try:
        with limits.request(client):
            return True
    except ApiError:
        return False


def test_a_silent_client_may_send_a_burst_and_then_its_rate(clock):
    limits, client = RateLimits(clock), Client("a", requests_per_minute=60)
    assert [allowed(limits, client) for _ in range(12)] == [True] * int(BURST_S) + [False] * 2
    clock.now += 0.9
    assert not allowed(limits, client)
    clock.now += 0.1
    assert allowed(limits, client)
    assert not allowed(limits, client)


def test_the_wait_that_is_told_is_the_one_that_helps(clock):
    limits, client = RateLimits(clock), Client("a", requests_per_minute=6)
    assert allowed(limits, client)
    with pytest.raises(ApiError) as caught, limits.request(client):
        pass
    assert caught.value.status == 429
    assert caught.value.retry_after_s == pytest.approx(10)
    clock.now += caught.value.retry_after_s
    assert allowed(limits, client)


def test_a_rate_below_one_a_burst_still_lets_one_through(clock):
    limits, client = RateLimits(clock), Client("a", requests_per_minute=0.5)
    assert allowed(limits, client)
    assert not allowed(limits, client)
    clock.now += 120
    assert allowed(limits, client)


def test_clients_do_not_share(clock):
    limits = RateLimits(clock)
    first, second = (Client(name, requests_per_minute=1, max_concurrent=1) for name in "ab")
    assert allowed(limits, first)
    assert not allowed(limits, first)
    assert allowed(limits, second)


def test_requests_at_a_time_are_counted_until_they_end_however_they_do():
    limits, client = RateLimits(), Client("a", max_concurrent=2)
    with limits.request(client), contextlib.suppress(RuntimeError), limits.request(client):
        assert not allowed(limits, client)
        raise RuntimeError
    assert all(allowed(limits, client) for _ in range(5))


def test_what_is_refused_takes_nothing_of_the_rate(clock):
    limits, client = RateLimits(clock), Client("a", requests_per_minute=60, max_concurrent=1)
    with limits.request(client):
        assert not any(allowed(limits, client) for _ in range(100))
    assert sum(allowed(limits, client) for _ in range(20)) == int(BURST_S) - 1


@given(st.lists(st.floats(0, 30), max_size=200), st.floats(1, 600))
def test_no_window_has_more_than_a_burst_and_its_rate(pauses, rate):
    clock = Clock()
    limits, client = RateLimits(clock), Client("a", requests_per_minute=rate)
    taken = []
    for pause in pauses:
        clock.now += pause
        if allowed(limits, client):
            taken.append(clock.now)
    burst = max(1.0, BURST_S * rate / 60)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            seconds = taken[last] - taken[first]
            assert last - first + 1 <= burst + seconds * rate / 60 + 1e-6
