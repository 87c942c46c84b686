import pytest

from krea2_srt.engine.lifecycle import Request
from krea2_srt.engine.policy import PRIORITY_HEAD_START_S, STRETCH, edf, fcfs, srpt
from tests.engine.fakes import Harness, image


def request(arrival=0.0, remaining_ms=0.0, deadline=None, priority=0) -> Request:
    made = Request("r", (image(),), priority, arrival, deadline)
    made.remaining_ms = remaining_ms
    return made


def test_fcfs_goes_by_arrival_alone():
    assert fcfs(request(arrival=1, remaining_ms=9000)) < fcfs(request(arrival=2, remaining_ms=1))


def test_srpt_prefers_less_remaining_work():
    assert srpt(request(remaining_ms=80)) < srpt(request(remaining_ms=6000))


def test_srpt_never_puts_a_request_behind_one_that_arrives_after_its_key():
    big = request(arrival=3.0, remaining_ms=6000)
    assert srpt(big) == 3.0 + STRETCH * 6.0
    assert srpt(request(arrival=srpt(big), remaining_ms=0.001)) > srpt(big)
    assert srpt(request(arrival=srpt(big) - 1.0, remaining_ms=100)) < srpt(big)


def test_edf_goes_by_deadline_and_by_srpt_without_one():
    assert edf(request(deadline=5.0, remaining_ms=9000)) < edf(request(deadline=6.0))
    endless = request(arrival=2.0, remaining_ms=500)
    assert edf(endless) == srpt(endless)
    assert edf(request(deadline=5.9)) < edf(endless) < edf(request(deadline=6.1))


@pytest.mark.parametrize("policy", [fcfs, srpt, edf])
def test_a_level_of_priority_is_a_head_start_in_seconds(policy):
    for deadline in (None, 7.0):
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
    assert keys[0] == pytest.approx(STRETCH * (8 * 9.93 + 2.51 + 2.16) / 1e3, rel=0.01)
    assert keys[-2] == pytest.approx(STRETCH * 2.16e-3, rel=0.01)
