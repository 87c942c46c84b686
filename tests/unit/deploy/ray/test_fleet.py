"""Who waits for whom: the replicas as an HTTP process knows them."""

import random

from krea2_server.ray.fleet import SOURCE, Fleet
from krea2_srt.request import AdapterChoice

LARGE, SMALL = 10_000, 50


def fleet_of(*replicas: str) -> Fleet:
    fleet = Fleet()
    fleet.update({replica: {} for replica in replicas})
    return fleet


def send(fleet: Fleet, request: str, work: int) -> str:
    """Where it goes."""
    chosen = fleet.ranking(work, list(fleet.members))[0]
    fleet.place(request, chosen, work)
    return chosen


def test_equal_replicas_take_turns():
    fleet = fleet_of("a", "b", "c")
    chosen = []
    for number in range(6):
        chosen.append(send(fleet, "x", SMALL))
        fleet.remove("x")
        assert "x" not in fleet, number
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == {"a", "b", "c"}


def test_small_requests_go_around_a_large_one():
    fleet = fleet_of("a", "b")
    busy = send(fleet, "large", LARGE)
    (free,) = {"a", "b"} - {busy}
    assert send(fleet, "small", SMALL) == free


def test_passing_a_large_request_is_not_free():
    fleet = fleet_of("a", "b")
    for replica, request, work in (("a", "large", LARGE), ("b", "smaller", SMALL // 2)):
        fleet.place(request, replica, work)
    # On a it would wait for nothing, and the large one for it; on b it waits for half as much.
    assert send(fleet, "small", SMALL) == "b"


def test_large_requests_go_where_there_is_less_to_do_however_many_requests_that_are():
    fleet = fleet_of("a", "b")
    busy = send(fleet, "large", LARGE)
    for number in range(5):
        fleet.place(f"small {number}", ({"a", "b"} - {busy}).pop(), SMALL)
    assert send(fleet, "another", LARGE) != busy


def test_what_other_processes_have_sent_counts_and_our_own_not_twice():
    fleet = Fleet()
    fleet.update(
        {"a": {"outstanding_ms": {SOURCE: LARGE}}, "b": {"outstanding_ms": {"other": SMALL}}}
    )
    assert send(fleet, "x", SMALL) == "a"


def test_a_replica_that_is_not_ready_comes_last():
    fleet = Fleet()
    fleet.update({"a": {"ready": False}, "b": {"outstanding_ms": {"other": LARGE}}})
    assert fleet.ranking(SMALL, ["a", "b"]) == ["b", "a"]


def test_a_request_counts_on_one_replica_only():
    fleet = fleet_of("a", "b")
    fleet.place("x", "a", LARGE)
    fleet.place("x", "b", LARGE)
    assert [len(fleet.members[name].load) for name in "ab"] == [0, 1]
    # The end of the attempt on a, told after the second has begun.
    fleet.remove("x", "a")
    assert "x" in fleet
    fleet.remove("x", "b")
    assert "x" not in fleet


def test_how_many_are_ahead():
    fleet = fleet_of("a")
    assert fleet.ahead("unknown") == 0
    for name, work in (("first", SMALL), ("large", LARGE), ("second", SMALL)):
        fleet.place(name, "a", work)
    assert [fleet.ahead(name) for name in ("first", "second", "large")] == [0, 1, 2]


def test_a_dead_replica_takes_its_requests_along():
    fleet = fleet_of("a", "b")
    fleet.place("x", "a", LARGE)
    fleet.drop("a")
    assert fleet.ranking(SMALL, list(fleet.members)) == ["b"]
    assert fleet.ahead("x") == 0
    fleet.remove("x", "a")
    assert "x" not in fleet


def test_whatever_comes_and_goes_nothing_remains():
    rng, fleet = random.Random(7), fleet_of("a", "b", "c")
    requests: set[str] = set()
    for number in range(2000):
        match rng.randrange(5):
            case 0 | 1:
                requests.add(str(number))
                send(fleet, str(number), rng.choice((SMALL, LARGE)))
            case 2 | 3 if requests:
                fleet.remove(requests.pop())
            case 4:
                names = rng.sample("abcde", rng.randint(1, 5))
                fleet.update({name: {"ready": rng.random() < 0.9} for name in names})
    for request in requests:
        fleet.remove(request)
    assert all(not len(member.load) for member in fleet.members.values())
    assert all(member.load.outstanding == 0 for member in fleet.members.values())


def test_a_replica_that_has_the_adapter_is_preferred_unless_it_has_too_much_to_do():
    fleet = fleet_of("a", "b")
    there = {"sepia": ("device", 235_000_000)}
    fleet.update({"a": {}, "b": {"statistics": {"adapters": there}}})
    sepia = [AdapterChoice("sepia")]
    assert fleet.ranking(SMALL, ["a", "b"], sepia) == ["b", "a"]
    assert fleet.ranking(SMALL, ["a", "b"], [AdapterChoice("other")]) == ["a", "b"]
    fleet.place("x", "b", LARGE)
    fleet.place("y", "b", LARGE)
    assert fleet.ranking(LARGE, ["a", "b"], sepia) == ["a", "b"]
