"""What is measured: images a second of one replica and of two, and latency by router."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from krea2_bench.load.endpoint import Endpoint, EndpointOptions
from krea2_bench.load.mix import Kind
from krea2_bench.load.outcome import DONE, Outcome
from krea2_bench.load.plan import at_rate, draw_plan
from krea2_bench.load.points import LoadRunner
from krea2_bench.ray_serve.cluster import LocalCluster
from krea2_bench.ray_serve.quota import limited

SIZES = (2, 1, 1, 2)
"""Replicas, in turn: what drifts does not favour one."""

ROUTERS = ("work", "round_robin")

CORES = 0.55
"""That each engine has: of two cores something is left for all else, also beside three engines.

A part for each, so that what one leaves idle is lost, as on machines of their own.
"""

_REPLICAS = 3


@dataclass(frozen=True)
class Latencies:
    """Seconds of one round's requests to one router, by size; infinite if it failed."""

    router: str
    by_size: dict[str, list[float]]

    @property
    def all(self) -> list[float]:
        return [value for values in self.by_size.values() for value in values]


def throughput(cluster: LocalCluster, mix: Sequence[Kind], count: int, clients: int) -> float:
    """Requests a second of a closed loop, without its beginning and its end.

    Raises:
        RuntimeError: a request failed.
    """
    outcomes = _run(cluster, mix, count, f"{clients} clients", clients=clients)
    failed = [outcome.error for outcome in outcomes if outcome.outcome != DONE]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} requests failed: {failed[0]}")
    ends = sorted(outcome.done_s for outcome in outcomes)
    first, last = clients, count - clients
    return (last - first) / (ends[last] - ends[first])


def scaling(
    cluster: LocalCluster, mix: Sequence[Kind], count: int, clients: int
) -> dict[int, list[float]]:
    """Requests a second, by the number of replicas."""
    found: dict[int, list[float]] = {size: [] for size in sorted(set(SIZES))}
    for size in SIZES:
        cluster.deploy(min_replicas=size, max_replicas=size)
        while cluster.queue.get("replicas") != size:
            time.sleep(0.5)
        throughput(cluster, mix, 3 * clients, clients)  # what the first requests cost
        with limited(cluster.schedulers(), CORES):
            found[size].append(throughput(cluster, mix, count, clients))
    return found


def latencies(
    cluster: LocalCluster, mix: Sequence[Kind], load: float, count: int, rounds: int, clients: int
) -> tuple[float, list[Latencies]]:
    """The same requests at the same times to each router, in turn, on three replicas.

    Args:
        load: share of what the replicas do at most.
        clients: that find out how much that is.

    Returns:
        Requests a second, and a `Latencies` for each round and router.
    """
    rate = 0.0
    found: list[Latencies] = []
    for turn in range(rounds):
        for router in ROUTERS if turn % 2 == 0 else reversed(ROUTERS):
            if not found or found[-1].router != router:
                cluster.deploy(min_replicas=_REPLICAS, max_replicas=_REPLICAS, router=router)
            with limited(cluster.schedulers(), CORES):
                if not rate:
                    # As a whole: a mix's large ones end last, and are most of the work.
                    outcomes = _run(cluster, mix, count, f"{clients} clients", clients=clients)
                    rate = load * count / max(outcome.done_s for outcome in outcomes)
                what = f"round {turn + 1}, {router}"
                outcomes = _run(cluster, mix, count, what, rate=rate, number=turn)
            by_size: dict[str, list[float]] = {kind.size: [] for kind in mix}
            for outcome in outcomes:
                done = outcome.outcome == DONE
                by_size[outcome.size].append(outcome.latency_s if done else math.inf)
            found.append(Latencies(router, by_size))
    return rate, found


def _run(
    cluster: LocalCluster,
    mix: Sequence[Kind],
    count: int,
    what: str,
    *,
    clients: int | None = None,
    rate: float | None = None,
    number: int = 0,
) -> list[Outcome]:
    plan = draw_plan(mix, count, seed=7, number=number)
    if rate is not None:
        plan = at_rate(plan, rate, "poisson", 1.0, seed=number)

    async def run() -> list[Outcome]:
        async with Endpoint(EndpointOptions(cluster.url)) as endpoint:
            await endpoint.find_model()
            return await LoadRunner().run(endpoint, plan, what, clients)

    return asyncio.run(run())
