"""The experiment: runs simulations of one workload, each only once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from krea2_bench.simulation.cluster import Hardware, Result, simulate
from krea2_bench.simulation.schedulers import Scheduler
from krea2_bench.simulation.summary import Summary, summarise
from krea2_bench.simulation.traces import Arrival, Job, Share, draw_trace

TARGET = 0.95
"""Part of the requests of every size class that must be in time."""

STEP = 0.05
GRID = tuple(round(STEP * i, 2) for i in range(1, 23))
"""Loads at which the highest bearable one is looked for: up to 1.1."""


@dataclass
class Experiment:
    """A workload on some hardware.

    Attributes:
        hardware: the cluster.
        mix: of jobs.
        requests: of every simulation.
        process: of arrivals; one of `traces.PROCESSES`.
        simulations: run so far.
    """

    hardware: Hardware
    mix: Sequence[Share]
    requests: int
    process: str = "poisson"
    simulations: int = 0
    _summaries: dict[tuple[Scheduler, float, int, str], Summary] = field(default_factory=dict)
    _last: tuple[tuple[float, int, str], list[Arrival]] | None = None

    def trace(self, load: float, seed: int, process: str | None = None) -> list[Arrival]:
        """What arrives at a load: offered work / capacity."""
        chosen = (load, seed, process or self.process)
        if self._last is None or self._last[0] != chosen:

            def rate(jobs: Sequence[Job]) -> float:
                return self.hardware.rate(jobs, load)

            trace = draw_trace(process or self.process, self.mix, self.requests, rate, seed)
            self._last = chosen, trace
        return self._last[1]

    def result(
        self, scheduler: Scheduler, load: float, seed: int, process: str | None = None
    ) -> Result:
        """Simulate, even if it has been done."""
        self.simulations += 1
        print(
            f"simulation {self.simulations}: {scheduler.name}, load {load:.2f}, seed {seed}",
            file=sys.stderr,
            flush=True,
        )
        return simulate(self.hardware, scheduler, self.trace(load, seed, process))

    def run(
        self, scheduler: Scheduler, load: float, seed: int, process: str | None = None
    ) -> Summary:
        """Simulate, or remember."""
        wanted = scheduler, load, seed, process or self.process
        if wanted not in self._summaries:
            self._summaries[wanted] = summarise(self.result(scheduler, load, seed, process))
        return self._summaries[wanted]

    def loads(self, scheduler: Scheduler, seed: int) -> list[float]:
        """Loads of all simulations so far, in order."""
        wanted = scheduler, seed, self.process
        return sorted(load for s, load, *rest in self._summaries if (s, *rest) == wanted)

    def bears(self, scheduler: Scheduler, load: float, seed: int) -> bool:
        """Whether every size class meets the target."""
        return self.run(scheduler, load, seed).worst_attainment >= TARGET

    def capacity(self, scheduler: Scheduler, seed: int, first: Sequence[float] = ()) -> float:
        """The highest load of `GRID` that a scheduler bears, by bisection; 0 where none is.

        Args:
            scheduler: must bear less the higher the load.
            seed: of the trace.
            first: loads to try before others.
        """
        low, high = -1, len(GRID)
        wanted = [GRID.index(load) for load in first if load in GRID]
        while high - low > 1:
            at = wanted.pop(0) if wanted else (low + high) // 2
            if low < at < high:
                low, high = (at, high) if self.bears(scheduler, GRID[at], seed) else (low, at)
        return GRID[low] if low >= 0 else 0.0
