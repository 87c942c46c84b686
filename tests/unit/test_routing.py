"""Routing among replicas, without any."""

from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt import routing
from krea2_srt.engine import policy
from krea2_srt.request import AdapterChoice, ImageRequest
from krea2_srt.routing import ReplicaExited, Replicas, adapters_ms, image_ms

SMALL = image_ms(ImageRequest(prompt="x", width=256, height=256, steps=8), 1)
BIG = image_ms(ImageRequest(prompt="x", width=2048, height=2048, steps=52, guidance=3.5), 1)


def chosen_for(replicas: Replicas, work: int = SMALL) -> int:
    """The replica of a request that ends at once."""
    with replicas.place(work) as assignment:
        return assignment.index


def test_small_requests_go_around_a_big_one():
    replicas = Replicas(2)
    with replicas.place(BIG) as big:
        assert {chosen_for(replicas) for _ in range(10)} == {1 - big.index}


def test_a_crowd_of_small_requests_uses_the_big_ones_replica_too():
    """They overtake the big one there, which counts as one more of them; all on the other replica,
    they would wait for each other."""
    replicas = Replicas(2)
    with ExitStack() as stack:
        big = stack.enter_context(replicas.place(BIG))
        for _ in range(10):
            stack.enter_context(replicas.place(SMALL))
        assert len(replicas.loads[big.index]) == 5
    assert replicas.outstanding == [0, 0]


def test_one_after_the_other_they_take_turns():
    replicas = Replicas(3)
    assert [chosen_for(replicas) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_replica_that_is_stuck_gets_less():
    replicas = Replicas(2)
    with ExitStack() as stack:
        stuck = [stack.enter_context(replicas.place(SMALL)) for _ in range(2)]
        assert {one.index for one in stuck} == {0, 1}
        stack.enter_context(replicas.place(SMALL))
        assert sorted(len(load) for load in replicas.loads) == [1, 2]


def test_a_dead_replica_gets_nothing_until_it_lives_again():
    replicas = Replicas(2)
    replicas.mark_dead(0)
    assert [chosen_for(replicas) for _ in range(3)] == [1, 1, 1]
    replicas.mark_dead(1)
    with pytest.raises(ReplicaExited, match="all replicas have exited"):
        chosen_for(replicas)
    replicas.mark_live(0)
    assert chosen_for(replicas) == 0


def test_how_many_are_ahead_goes_by_the_engines_order():
    replicas = Replicas(1)
    with replicas.place(BIG) as big, replicas.place(SMALL) as small:
        assert (replicas.ahead(big), replicas.ahead(small)) == (1, 0)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 30)), max_size=40), st.data())
def test_whatever_begins_and_ends_in_whatever_order_nothing_remains(steps, data):
    """Also where a replica dies with requests on it."""
    replicas = Replicas(3)
    with ExitStack() as stack:
        open_ones = []
        for work, number in steps:
            if number == 0:
                replicas.mark_dead(data.draw(st.integers(0, 2)))
            elif number < 12 and open_ones:
                open_ones.pop(number % len(open_ones)).close()
            else:
                with suppress(ReplicaExited):
                    one = stack.enter_context(ExitStack())
                    one.enter_context(replicas.place(work))
                    open_ones.append(one)
    assert replicas.outstanding == [0, 0, 0]
    assert [len(load) for load in replicas.loads] == [0, 0, 0]


def test_adapters_cost_what_it_takes_to_have_them_on_the_device():
    there = {"near": ("device", 10**8), "host": ("host", 10**8), "disk": ("disk", 10**8)}

    def ms(*names: str) -> int:
        return adapters_ms([AdapterChoice(name) for name in names], there)

    assert ms() == ms("near") == 0
    assert 0 < ms("host") < ms("disk") < ms("unknown")
    assert ms("host", "disk", "near") == ms("host") + ms("disk")


def test_a_replica_that_has_the_adapter_is_preferred_unless_it_has_too_much_to_do():
    replicas = Replicas(2)
    more_ms = [300, 0].__getitem__
    with replicas.place(1000, more_ms) as first:
        assert first.index == 1
        with replicas.place(1000, more_ms) as second:
            assert second.index == 0, "the other one would take longer than to read it"


def test_the_estimate_grows_with_the_work():
    def estimate(images: int = 1, **fields: object) -> int:
        values = {"prompt": "x", "width": 256, "height": 256, "steps": 8} | fields
        return image_ms(ImageRequest(**values), images)

    base = estimate()
    assert estimate(4) == pytest.approx(4 * base, rel=0.05)
    assert estimate(steps=16) == pytest.approx(2 * base, rel=0.05)
    assert estimate(guidance=3.5) == pytest.approx(2 * base, rel=0.05)
    # 742 ms a step and branch is the roofline's figure for 2048x2048.
    assert pytest.approx(2 * 52 * 742, rel=0.05) == BIG


def test_the_order_follows_the_policys_constant(monkeypatch):
    """The simulator varies it, and routers must go by the same order as engines."""
    monkeypatch.setattr(routing.time, "monotonic", lambda: 100.0)
    assert routing.order_key(2000) == 100.0 + 2 * policy.STRETCH
    monkeypatch.setattr(policy, "STRETCH", 8.0)
    assert routing.order_key(2000) == 116.0
