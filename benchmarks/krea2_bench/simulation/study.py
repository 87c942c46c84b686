"""The study: which simulations answer what, and their answers as plain data."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from krea2_bench.percentiles import percentile
from krea2_bench.simulation.cluster import simulate
from krea2_bench.simulation.experiment import STEP, TARGET, Experiment
from krea2_bench.simulation.schedulers import (
    SLO_FACTOR,
    Scheduler,
    first_come_first_served,
    ours,
    request_at_a_time,
)
from krea2_bench.simulation.summary import WARM_UP, Summary, summarise
from krea2_bench.simulation.traces import PROCESSES, Arrival

BASELINES = (request_at_a_time("round-robin"), request_at_a_time("least-work"))
DEFAULT = ours("srpt", "added-wait")
"""Ours, for requests without a deadline."""

MAIN = (
    *BASELINES,
    DEFAULT,
    ours("edf", "added-wait"),
    ours("srpt", "total-ahead"),
)
"""Those whose highest loads are looked for on all traces, of the others on the first only."""

OTHERS = (
    first_come_first_served("least-work"),
    ours("srpt", "round-robin"),
    ours("srpt", "total-work"),
    ours("srpt", "least-work"),
    ours("edf", "least-work"),
    ours("edf", "work-ahead"),
)
HIGH = 0.95
OVERLOAD = 1.05
"""Loads at and beyond the limit, beside the study's own."""

MAX_LOSS = 0.1
"""Share of the best throughput that a default policy may cost."""

MIN_CAPACITY_RATIO = 1.8
MAX_MISS_RATIO = 0.25
"""Targets against request-at-a-time."""


@dataclass(frozen=True)
class Plan:
    """How much to simulate.

    Attributes:
        load: at which policies are compared.
        loads: of the curves.
        seeds: of the traces in tables.
        sensitivities: whether to vary parameters too, and how requests arrive.
    """

    load: float = 0.8
    loads: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
    seeds: Sequence[int] = (0, 1, 2)
    sensitivities: bool = True


def study(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """Run all of it."""
    for scheduler in MAIN:
        for load in plan.loads:
            experiment.run(scheduler, load, plan.seeds[0])
    capacity = {s.name: _capacities(experiment, s, plan) for s in (*MAIN, *OTHERS)}
    table = {
        s.name: [experiment.run(s, plan.load, seed) for seed in plan.seeds]
        for s in (*MAIN, *OTHERS)
    }
    # With the loads at which the search for the highest has looked.
    curves = {s.name: _curve(experiment, s, plan.seeds[0]) for s in MAIN}
    return {
        "alone_s": _alone(table),
        "curves": curves,
        "capacity": capacity,
        "table": {name: [s.as_dict() for s in found] for name, found in table.items()},
        "claims": _claims(capacity, table),
        "default": _default(table),
        "latencies": {s.name: _latencies(experiment, s, plan) for s in (*BASELINES, DEFAULT)},
        "sensitivity": _sensitivity(experiment, plan) if plan.sensitivities else [],
        "arrivals": _arrivals(experiment, plan) if plan.sensitivities else {},
    }


def replay(experiment: Experiment, trace: Sequence[Arrival]) -> dict[str, Any]:
    """All schedulers on one given trace."""
    found = {s.name: [summarise(simulate(experiment.hardware, s, trace))] for s in (*MAIN, *OTHERS)}
    return {
        "alone_s": _alone(found),
        "table": {name: [s.as_dict() for s in summaries] for name, summaries in found.items()},
        "default": _default(found),
    }


def _curve(experiment: Experiment, scheduler: Scheduler, seed: int) -> list[dict[str, Any]]:
    """At all loads that have been simulated."""
    return [
        {"load": load, **experiment.run(scheduler, load, seed).as_dict()}
        for load in experiment.loads(scheduler, seed)
    ]


def _capacities(experiment: Experiment, scheduler: Scheduler, plan: Plan) -> list[float]:
    main = scheduler in MAIN
    # Loads that are simulated anyway; then those near what the first trace has come to.
    first = plan.loads if main else [plan.load]
    found: list[float] = []
    for seed in plan.seeds if main else plan.seeds[:1]:
        found.append(experiment.capacity(scheduler, seed, first))
        first = [round(found[0] + step, 2) for step in (0.0, STEP, -STEP)]
    return found


def _alone(table: dict[str, list[Summary]]) -> dict[str, float]:
    """Mean time alone by size class."""
    summary = next(iter(table.values()))[0]
    return {name: round(size.alone_s, 4) for name, size in summary.sizes.items()}


def _claims(
    capacity: dict[str, list[float]], table: dict[str, list[Summary]]
) -> list[dict[str, Any]]:
    """Every scheduler of ours against both baselines, trace by trace."""
    claims = []
    bases = [baseline.name for baseline in BASELINES]
    for name in (name for name in capacity if name not in bases):
        for base in bases:
            load = _mean_ratio(capacity[name], capacity[base])
            misses = _mean_ratio(*([s.misses for s in table[which]] for which in (name, base)))
            claims.append(
                {
                    "scheduler": name,
                    "baseline": base,
                    "capacity_ratio": load,
                    "capacity_met": load is not None and load >= MIN_CAPACITY_RATIO,
                    "miss_ratio": misses,
                    "misses_met": misses is not None and misses <= MAX_MISS_RATIO,
                }
            )
    return claims


def _mean_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Over the traces that both have served; None where theirs is 0."""
    pairs = list(zip(ours, theirs, strict=False))
    return round(mean(a / b for a, b in pairs), 4) if all(b > 0 for _, b in pairs) else None


def _default(table: dict[str, list[Summary]]) -> str:
    """The best goodput of those that lose little throughput."""

    def of(name: str, figure: Callable[[Summary], float]) -> float:
        return mean(figure(summary) for summary in table[name])

    most = max(of(name, lambda s: s.images_per_s) for name in table)
    good = [n for n in table if of(n, lambda s: s.images_per_s) >= (1 - MAX_LOSS) * most]
    return max(good, key=lambda name: of(name, lambda s: s.goodput_per_s))


def _latencies(experiment: Experiment, scheduler: Scheduler, plan: Plan) -> dict[str, list[float]]:
    """By size class, the latencies that 1, 2, ... 99 percent do not exceed, in s."""
    result = experiment.result(scheduler, plan.load, plan.seeds[0])
    first = int(WARM_UP * len(result.trace))
    size_of = np.array([arrival.job.size for arrival in result.trace])[first:]
    latency_s = result.latency_s[first:]
    return {
        size: [round(percentile(latency_s[size_of == size], q), 4) for q in range(1, 100)]
        for size in experiment.run(scheduler, plan.load, plan.seeds[0]).sizes
    }


def _sensitivity(experiment: Experiment, plan: Plan) -> list[dict[str, Any]]:
    """One parameter of our default at a time."""
    seed = plan.seeds[0]
    rows: list[dict[str, Any]] = []

    def add(
        experiment: Experiment,
        name: str,
        value: object,
        scheduler: Scheduler,
        loads: Sequence[float],
    ) -> None:
        for load in loads:
            summary = experiment.run(scheduler, load, seed).as_dict()
            rows.append(
                {"parameter": name, "value": str(value), "router": scheduler.router, "load": load}
                | summary
            )

    for stretch in (8.0, 16.0, 32.0, 64.0, 128.0):
        scheduler = replace(DEFAULT, stretch=stretch)
        add(experiment, "STRETCH", f"{stretch:g}", scheduler, (plan.load, HIGH, OVERLOAD))
    # Earliest due date first, were every request due when its SLO says.
    due = replace(DEFAULT, weights=(SLO_FACTOR, 0.0))
    add(experiment, "key", f"arrival + {SLO_FACTOR:g} total", due, (plan.load, HIGH, OVERLOAD))
    for turn_ms in (100.0, 200.0, 400.0):
        config = replace(DEFAULT.config, max_turn_ms=turn_ms)
        add(
            experiment, "max_turn_ms", f"{turn_ms:g}", replace(DEFAULT, config=config), (plan.load,)
        )
    # Under the roofline nothing but the floor is shared by a pack, so packs gain nothing from
    # the smallest size on. Here reading the weights is added to the arithmetic instead.
    cost = experiment.hardware.cost
    added = replace(cost, launch=cost.launch + cost.floor, floor=0.0)
    other = Experiment(
        replace(experiment.hardware, cost=added),
        experiment.mix,
        experiment.requests,
        experiment.process,
    )
    for gain in (0.1, 0.2, 0.4):
        scheduler = replace(DEFAULT, min_gain=gain)
        add(
            other,
            "MIN_GAIN, weights read beside arithmetic",
            f"{gain:g}",
            scheduler,
            (HIGH, OVERLOAD),
        )
    experiment.simulations += other.simulations
    return rows


def _arrivals(experiment: Experiment, plan: Plan) -> dict[str, dict[str, Any]]:
    """Other ways to arrive, at the same load."""
    return {
        process: {
            s.name: experiment.run(s, plan.load, plan.seeds[0], process).as_dict()
            for s in (*BASELINES, DEFAULT)
        }
        for process in PROCESSES
    }


def settings(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """All that the answers depend on, but the code."""
    return {
        "replicas": experiment.hardware.replicas,
        "host_ms": experiment.hardware.host_ms,
        "cost": asdict(experiment.hardware.cost),
        "mix": [asdict(share) for share in experiment.mix],
        "process": experiment.process,
        "requests": experiment.requests,
        "slo_factor": SLO_FACTOR,
        "target": TARGET,
        "min_capacity_ratio": MIN_CAPACITY_RATIO,
        "max_miss_ratio": MAX_MISS_RATIO,
        **asdict(plan),
    }
