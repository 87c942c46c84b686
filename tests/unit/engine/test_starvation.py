"""No request starves, however many smaller ones come.

The bound. Let a request of W seconds of work arrive at time a, with B seconds of work in the
engine. Its key is never later than a + STRETCH * W under `srpt` (it falls as the request
progresses), and under `edf` without a deadline. A request that arrives at t has a key of at least
t - H, where H is the head start of its priority. So all that may go before ours arrived before
a + STRETCH * W + H. The engine never idles while there is work; at load L, requests bring in L
seconds of work a second. Until ours ends, the engine does nothing but

    the work there was                          B
    work that arrived later and goes before     L * (STRETCH * W + H)
    the request itself                          W
    a unit of work or a request that straddles  max_turn_ms, and one small request

and the sum is when it has ended at the latest. Above a load of 1 admission bounds it: at
a + STRETCH * W + H there are at most Q = max_queue_s seconds of work in the engine, ours among
them, and all that comes after that goes behind:

    STRETCH * W + H + Q + max_turn_ms
"""

import pytest

from krea2_srt.engine import policy
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.lifecycle import Request
from tests.unit.engine.fakes import H200, Arrival, Harness

T256, T2048 = 256 + 64, 128 * 128 + 64
BIG = {"size": 2048, "steps": 2}
"""Its steps run in slices. Few steps, as the runs are `STRETCH` times as long as its work."""
SMALL_S = (8 * H200.step([T256]) + H200.encode(64) + H200.decode(256**2)) / 1e3
BIG_S = (2 * H200.step([T2048]) + H200.encode(64) + H200.decode(2048**2)) / 1e3
TURN_S = 0.2
ARRIVES = 5.0


def serve(
    policy_name: str, load: float, until: float, max_queue_s: float = 120.0, **small: object
) -> tuple[Harness, Request, float]:
    """A stream of small requests, and a big one in it; returns that, and the work before it."""
    harness = Harness(EngineConfig(policy=policy_name, max_queue_s=max_queue_s))
    number = int((ARRIVES + until) * load / SMALL_S)
    stream = [Arrival(i * SMALL_S / load, {"size": 256, **small}) for i in range(number)]
    coming = [arrival for arrival in stream if arrival.time > ARRIVES]
    harness.run([arrival for arrival in stream if arrival.time <= ARRIVES], until=ARRIVES)
    backlog_s = harness.engine.outstanding_ms / 1e3
    big = harness.submit(**BIG, request_id="big")
    harness.run(coming, until=big.arrival + until)
    return harness, big, backlog_s


def bound(load: float, backlog_s: float, head_start_s: float = 0.0) -> float:
    return backlog_s + load * (policy.STRETCH * BIG_S + head_start_s) + BIG_S + TURN_S + SMALL_S


def test_the_figures_are_those_of_the_design():
    assert pytest.approx(1.57, rel=0.01) == BIG_S
    assert pytest.approx(0.084, rel=0.01) == SMALL_S
    assert bound(0.9, 0.0) < 50


@pytest.mark.parametrize("load", [0.8, 0.99])
@pytest.mark.parametrize("policy_name", ["srpt", "edf"])
def test_a_big_request_ends_within_the_bound_under_a_stream_of_small_ones(policy_name, load):
    harness, big, backlog_s = serve(policy_name, load, bound(load, 1.0) + 5)
    assert big.ended
    assert harness.latency(big) <= bound(load, backlog_s)
    assert harness.refused == 0
    # The small ones do go first until then.
    assert harness.latency(big) > 3 * BIG_S


@pytest.mark.parametrize("deadline_s", [2.2, 60.0])
def test_small_requests_with_deadlines_starve_nothing_under_edf(deadline_s):
    assert 2.2 < policy.STRETCH * SMALL_S < 60.0
    harness, big, backlog_s = serve("edf", 0.95, bound(0.95, 1.0) + 5, deadline_s=deadline_s)
    assert big.ended
    assert harness.engine.counters.failed == 0
    assert harness.latency(big) <= bound(0.95, backlog_s)


@pytest.mark.parametrize("policy_name", ["srpt", "edf"])
@pytest.mark.slow
def test_a_stream_of_greater_priority_delays_by_its_head_start_at_most(policy_name):
    limit = bound(0.95, 1.0, head_start_s=policy.PRIORITY_HEAD_START_S)
    harness, big, backlog_s = serve(policy_name, 0.95, limit + 5, priority=1)
    assert big.ended
    assert harness.latency(big) <= bound(0.95, backlog_s, policy.PRIORITY_HEAD_START_S)
    same_priority, same, _ = serve(policy_name, 0.95, limit)
    assert harness.latency(big) > same_priority.latency(same) + 2


@pytest.mark.parametrize("load", [1.2, 2.0])
@pytest.mark.parametrize("policy_name", ["srpt", "edf"])
def test_above_capacity_admission_bounds_it(policy_name, load):
    max_queue_s = 12.0
    limit = policy.STRETCH * BIG_S + max_queue_s + TURN_S
    harness, big, _ = serve(policy_name, load, limit + 5, max_queue_s=max_queue_s)
    assert big.ended
    assert harness.latency(big) <= limit
    assert harness.refused > 0


@pytest.mark.parametrize("load", [0.99, 1.2])
def test_without_ageing_it_does_take_longer(load, monkeypatch):
    """What is left to it is 1 - load of the device, which has to be less than the bound gives."""
    max_queue_s = 5.0
    limit = bound(load, 1.0) if load < 1 else policy.STRETCH * BIG_S + max_queue_s + TURN_S
    _, big, _ = serve("srpt", load, limit, max_queue_s=max_queue_s)
    assert big.ended
    monkeypatch.setattr(policy, "STRETCH", 1e6)
    _, big, _ = serve("srpt", load, 1.5 * limit, max_queue_s=max_queue_s)
    assert not big.ended


def test_several_big_requests_all_end_within_the_sum_of_their_work():
    """Each is in the backlog of those behind it."""
    harness = Harness()
    load, number = 0.9, 4
    limit = load * policy.STRETCH * BIG_S + number * BIG_S + 1.0
    small = int((ARRIVES + limit) * load / SMALL_S)
    stream = [Arrival(i * SMALL_S / load, {"size": 256}) for i in range(small)]
    big = [Arrival(ARRIVES, {**BIG, "request_id": f"big{i}"}) for i in range(number)]
    harness.run(stream + big, until=ARRIVES + limit)
    for i in range(number):
        assert f"big{i}" in harness.ended
