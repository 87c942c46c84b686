"""Routers: which replica gets a request. None knows how long a request will really take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from krea2_bench.simulation.replica import Replica


@dataclass(frozen=True)
class Offer:
    """A request that waits for its replica.

    Attributes:
        number: how many came before it.
        time_s: its arrival.
        key: its place in the order of the policy that all replicas have.
        work_ms: its time alone.
    """

    number: int
    time_s: float
    key: float
    work_ms: float = 0.0


Router = Callable[[Sequence[Replica], Offer], Replica]


def round_robin(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """One after the other: SGLang's."""
    return replicas[offer.number % len(replicas)]


def total_work(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """The least work in requests that have not ended, whatever is done of them."""
    return min(
        replicas, key=lambda replica: sum(taken.total_ms for taken in replica.taken.values())
    )


def least_work(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """The least work that is left."""
    return min(replicas, key=lambda r: r.engine.outstanding_ms + r.turn_ms(offer.time_s))


def total_ahead(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """Like `total_work`, but first of all among requests that come before this one."""

    def work(replica: Replica) -> tuple[float, float]:
        taken = replica.taken.values()
        ahead_ms = sum(other.total_ms for other in taken if other.key <= offer.key)
        return ahead_ms, sum(other.total_ms for other in taken)

    return min(replicas, key=work)


def added_wait(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """Ours: the least that it waits and makes others wait; see `krea2_srt.routing`."""

    def added(replica: Replica) -> tuple[float, float]:
        taken = replica.taken.values()
        wait_ms = sum(t.total_ms if t.key <= offer.key else offer.work_ms for t in taken)
        return wait_ms, sum(other.total_ms for other in taken)

    return min(replicas, key=added)


def work_ahead(replicas: Sequence[Replica], offer: Offer) -> Replica:
    """Like `least_work`, but first of all among requests that come before this one."""

    def work(replica: Replica) -> tuple[float, float]:
        inside = replica.engine.requests.values()
        ahead_ms = sum(other.remaining_ms for other in inside if other.key <= offer.key)
        return ahead_ms + replica.turn_ms(offer.time_s), replica.engine.outstanding_ms

    return min(replicas, key=work)


ROUTERS: dict[str, Router] = {
    "round-robin": round_robin,
    "total-work": total_work,
    "least-work": least_work,
    "total-ahead": total_ahead,
    "added-wait": added_wait,
    "work-ahead": work_ahead,
}
