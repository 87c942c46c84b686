"""A cluster: replicas behind a router, and what became of every request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np

from krea2_bench.simulation.replica import Replica
from krea2_bench.simulation.routers import ROUTERS, Offer
from krea2_bench.simulation.schedulers import SLO_FACTOR, Scheduler, request_at_a_time
from krea2_bench.simulation.traces import Arrival, Job
from krea2_srt.engine.cost import CostModel, roofline
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.policy import POLICIES
from krea2_srt.engine.statistics import Counters


@dataclass(frozen=True)
class Hardware:
    """What the replicas run on.

    Attributes:
        replicas: how many.
        cost: of work on the device of one; of an H200 by default.
        host_ms: of every unit of work, added to the device's.
    """

    replicas: int = 8
    cost: CostModel = field(default_factory=roofline)
    host_ms: float = 0.3

    def alone_s(self, job: Job) -> float:
        """Seconds of a job on an idle replica, from arrival to picture."""
        return _alone_s(self.cost, self.host_ms, job)

    def rate(self, jobs: Sequence[Job], load: float) -> float:
        """Arrivals a second at which offered work is this part of what all replicas can do."""
        mean_s = sum(self.alone_s(job) for job in jobs) / len(jobs)
        return load * self.replicas / mean_s


@lru_cache(maxsize=10_000)
def _alone_s(cost: CostModel, host_ms: float, job: Job) -> float:
    replica = Replica(request_at_a_time("round-robin").config, cost, host_ms)
    replica.submit("alone", job, 0.0)
    (_,) = replica.advance(float("inf"))
    return replica.clock.now


@dataclass(frozen=True)
class Result:
    """What became of a trace.

    Attributes:
        trace: what arrived.
        alone_s: of every request.
        latency_s: of every request; infinite where it failed.
        counters: of every replica.
        end_s: when the last replica became idle.
    """

    trace: Sequence[Arrival]
    alone_s: np.ndarray
    latency_s: np.ndarray
    counters: Sequence[Counters]
    end_s: float


class Cluster:
    """Replicas that advance together, from arrival to arrival.

    Args:
        hardware: what they run on.
        scheduler: how they serve; must be `installed` while the cluster is used.
        ended: called with the number of an arrival, the time (s) and whether it is done.
    """

    def __init__(
        self, hardware: Hardware, scheduler: Scheduler, ended: Callable[[int, float, bool], None]
    ) -> None:
        self.hardware = hardware
        self.scheduler = scheduler
        self.replicas = [
            Replica(scheduler.config, hardware.cost, hardware.host_ms)
            for _ in range(hardware.replicas)
        ]
        self._router = ROUTERS[scheduler.router]
        self._ended = ended
        self._numbers = count()

    def arrive(self, arrival: Arrival) -> None:
        """Let time pass until an arrival, and send it to a replica."""
        self._advance(arrival.time_s)
        number, job = next(self._numbers), arrival.job
        alone_s = self.hardware.alone_s(job)
        limit_s = SLO_FACTOR * alone_s if self.scheduler.deadlines else None
        deadline = None if limit_s is None else arrival.time_s + limit_s
        probe = Request("probe", (job.request,), 0, arrival.time_s, deadline)
        probe.remaining_ms = alone_s * 1e3
        key = POLICIES[self.scheduler.config.policy](probe)
        offer = Offer(number, arrival.time_s, key, work_ms=alone_s * 1e3)
        self._router(self.replicas, offer).submit(str(number), job, arrival.time_s, limit_s)

    def drain(self) -> None:
        """Let time pass until nothing is left."""
        self._advance(float("inf"))

    def _advance(self, time_s: float) -> None:
        for replica in self.replicas:
            for request in replica.advance(time_s):
                done = request.state is State.DONE
                self._ended(int(request.id), replica.clock.now, done)


def simulate(hardware: Hardware, scheduler: Scheduler, trace: Sequence[Arrival]) -> Result:
    """Serve a trace."""
    latency_s = np.full(len(trace), np.inf)

    def ended(number: int, time_s: float, done: bool) -> None:
        if done:
            latency_s[number] = time_s - trace[number].time_s

    with scheduler.installed():
        cluster = Cluster(hardware, scheduler, ended)
        for arrival in trace:
            cluster.arrive(arrival)
        cluster.drain()
    return Result(
        trace,
        np.array([hardware.alone_s(arrival.job) for arrival in trace]),
        latency_s,
        [replica.engine.counters for replica in cluster.replicas],
        max(replica.clock.now for replica in cluster.replicas),
    )
