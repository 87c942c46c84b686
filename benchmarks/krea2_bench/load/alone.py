"""How long requests take alone: what service-level objectives are multiples of."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from krea2_bench.load.endpoint import Endpoint, EndpointError
from krea2_bench.load.mix import Kind
from krea2_bench.load.outcome import DONE
from krea2_bench.load.plan import draw_plan
from krea2_bench.load.points import LoadRunner


async def measure_alone(
    load_runner: LoadRunner,
    endpoint: Endpoint,
    mix: Sequence[Kind],
    warm_up: int,
    repeats: int,
    seed: int,
) -> dict[str, float]:
    """Warm the server up, then send requests of each kind one at a time.

    Args:
        load_runner: that sends them.
        endpoint: of the server.
        mix: of kinds; those with the same work are measured once.
        warm_up: requests of each that do not count.
        repeats: that do.
        seed: of prompts and images; their images are not those of a plan with the same seed.

    Returns:
        Median seconds by `Kind.work`; empty without repeats, and where this is interrupted.

    Raises:
        EndpointError: a request failed.
    """
    found = {}
    for number, (work, kind) in enumerate({kind.work: kind for kind in mix}.items(), 1):
        plan = draw_plan([replace(kind, priority=0)], warm_up + repeats, seed + 7919 * number)
        outcomes = await load_runner.run(endpoint, plan, f"{work}, alone", concurrency=1)
        if load_runner.interrupted:
            return {}
        for outcome in outcomes:
            if outcome.outcome != DONE:
                url = endpoint.options.url
                raise EndpointError(f"url: {url} did not generate {work}: {outcome.error}")
        if repeats:
            found[work] = median(outcome.latency_s for outcome in outcomes[warm_up:])
    return found
