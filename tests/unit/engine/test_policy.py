import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.engine.lifecycle import Request
from krea2_srt.engine.policy import PRIORITY_HEAD_START_S, STRETCH, edf, srpt
from tests.unit.engine.fakes import Harness, image


def request(arrival=0.0, remaining_ms=0.0, deadline=None, priority=0) -> Request:
    made = Request("r", (image(),), priority, arrival, deadline)
    made.remaining_ms = remaining_ms
    return made


def test_srpt_prefers_less_remaining_work():
    assert srpt(request(remaining_ms=80)) < srpt(request(remaining_ms=6000))


def test_srpt_never_puts_a_request_behind_one_that_arrives_after_its_key():
    big = request(arrival=3.0, remaining_ms=6000)
    assert srpt(big) == 3.0 + STRETCH * 6.0
    assert srpt(request(arrival=srpt(big), remaining_ms=0.001)) > srpt(big)
    assert srpt(request(arrival=srpt(big) - 1.0, remaining_ms=900 / STRETCH)) < srpt(big)


def test_edf_goes_by_deadline_and_by_srpt_without_one():
    assert edf(request(deadline=5.0, remaining_ms=9000)) < edf(
        request(deadline=6.0, remaining_ms=1000)
    )
    endless = request(arrival=2.0, remaining_ms=500)
    due = 2.0 + STRETCH * 0.5
    assert edf(endless) == srpt(endless) == due
    sooner = request(deadline=due - 0.1, remaining_ms=9000)
    later = request(deadline=due + 0.1, remaining_ms=9000)
    assert edf(sooner) < edf(endless) < edf(later)


@given(
    arrival=st.floats(0, 1e6),
    remaining_ms=st.floats(0, 1e6),
    in_s=st.floats(0, 24 * 3600.0),
    priority=st.integers(-10, 10),
)
def test_under_edf_a_deadline_makes_nothing_less_urgent(arrival, remaining_ms, in_s, priority):
    with_deadline = request(arrival, remaining_ms, arrival + in_s, priority)
    without = request(arrival, remaining_ms, None, priority)
    assert edf(with_deadline) <= edf(without)
    if in_s > STRETCH * remaining_ms / 1e3 + 1e-3:
        assert edf(with_deadline) == edf(without)


@pytest.mark.parametrize("policy", [srpt, edf])
def test_a_level_of_priority_is_a_head_start_in_seconds(policy):
    for deadline in (None, 7.0, 7000.0):
        normal = policy(request(1.0, 300, deadline))
        urgent = policy(request(1.0, 300, deadline, priority=2))
        assert urgent == pytest.approx(normal - 2 * PRIORITY_HEAD_START_S)
    later = request(1.0 + PRIORITY_HEAD_START_S - 1, 300, priority=1)
    assert policy(later) < policy(request(1.0, 300))
    much_later = request(1.0 + PRIORITY_HEAD_START_S + 1, 300, priority=1)
    assert policy(much_later) > policy(request(1.0, 300))


def test_the_key_of_a_request_follows_its_progress():
    harness = Harness()
    made = harness.submit(256, steps=8)
    keys = [made.key]
    while not made.ended:
        harness.turn()
        keys.append(made.key)
    assert keys == sorted(keys, reverse=True)
    assert keys[0] == pytest.approx(STRETCH * (8 * 9.93 + 2.51 + 2.49) / 1e3, rel=0.01)
    assert keys[-2] == pytest.approx(STRETCH * 2.49e-3, rel=0.01)
