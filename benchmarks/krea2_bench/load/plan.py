"""What is sent when: drawn from a seed before anything is sent, so that it can be sent again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from krea2_bench.arrivals import constant, gamma, poisson
from krea2_bench.load.mix import Kind, shares
from krea2_bench.load.prompts import Prompt, draw_prompt, nearest_prompt
from krea2_bench.simulation.traces import read_trace
from krea2_srt.errors import Krea2Error

ARRIVALS = ("poisson", "gamma", "constant")


class TraceError(Krea2Error):
    """A trace that cannot be replayed; the message names the line."""


@dataclass(frozen=True)
class Planned:
    """A request to be sent.

    Attributes:
        index: its place in the plan.
        kind: what it asks for.
        prompt: its text.
        seed: of its first image.
        due_s: when it is sent, after the plan's beginning; None where it is sent as soon as
            another has ended.
        hang_up_s: how long after it was sent its client hangs up; None is never.
    """

    index: int
    kind: Kind
    prompt: Prompt
    seed: int
    due_s: float | None = None
    hang_up_s: float | None = None


def draw_plan(
    mix: Sequence[Kind],
    count: int,
    seed: int,
    cancel_rate: float = 0.0,
    cancel_after_s: float = 1.0,
    number: int = 0,
) -> list[Planned]:
    """Requests of a mix in random order, without times; the same for the same arguments.

    Args:
        mix: their kinds; each gets its share, see `shares`.
        count: of requests.
        seed: of everything random. No two requests of a plan have an image in common.
        number: of the plan. Plans that differ in nothing else have the same kinds in the same
            order, with other prompts and images.
        cancel_rate: share of the requests whose clients hang up.
        cancel_after_s: mean of the exponential time after which they do.

    Raises:
        MixError: a kind wants prompts that there are not.
    """
    rng = np.random.default_rng(seed)
    kinds = [k for k, share in zip(mix, shares(mix, count), strict=True) for _ in range(share)]
    order = rng.permutation(count)
    hang_up = rng.random(count) < cancel_rate
    patience = rng.exponential(cancel_after_s, count)
    rng = np.random.default_rng([seed, number])
    first_seed = int(rng.integers(2**31))
    step = max(kind.n for kind in mix)
    return [
        Planned(
            index,
            kinds[place],
            draw_prompt(kinds[place].prompt_tokens, rng),
            first_seed + index * step,
            hang_up_s=float(patience[index]) if hang_up[index] else None,
        )
        for index, place in enumerate(order.tolist())
    ]


def at_rate(
    plan: Sequence[Planned], rate: float, arrivals: str, burstiness: float, seed: int
) -> list[Planned]:
    """The plan with times of arrival.

    Args:
        plan: of requests.
        rate: mean, in requests a second; infinite sends all at once.
        arrivals: one of `ARRIVALS`.
        burstiness: of gamma arrivals, see `krea2_bench.arrivals.gamma`.
        seed: of the times. Rates alone stretch them: the same requests come in the same order.
    """
    count = len(plan)
    if rate == math.inf:
        times = np.zeros(count)
    elif arrivals == "constant":
        times = constant(count, rate)
    else:
        rng = np.random.default_rng([seed, 1])
        if arrivals == "gamma":
            times = gamma(count, rate, rng, burstiness)
        else:
            times = poisson(count, rate, rng)
    return [replace(p, due_s=t) for p, t in zip(plan, times.tolist(), strict=True)]


def replayed(path: Path, seed: int, speed: float = 1.0) -> list[Planned]:
    """A trace as the cluster simulator writes and replays it: a line of JSON for each request,
    ``{"time_s", "width", "height", "steps", "num_images", "text_tokens"}``, of which the last
    three may be missing.

    Args:
        path: of the file.
        seed: of prompts, which have the nearest lengths that there are, and of images.
        speed: times are divided by it.

    Raises:
        TraceError: naming the line that is none, or why the file cannot be read.
    """
    try:
        trace = read_trace(path)
    except ValueError as error:
        raise TraceError(f"trace: {error}") from None
    except OSError as error:
        raise TraceError(f"trace: {path}: {error.strerror}") from None
    rng = np.random.default_rng(seed)
    first_seed = int(rng.integers(2**31))
    plan: list[Planned] = []
    for index, arrival in enumerate(trace):
        job = arrival.job
        counts = (job.width, job.height, job.steps, job.num_images)
        if not all(isinstance(value, int) and value > 0 for value in counts):
            raise TraceError(
                f"trace: {path.name}, line {index + 1}: width, height, steps and num_images must "
                "be whole numbers from 1 on"
            )
        if not math.isfinite(arrival.time_s):
            raise TraceError(f"trace: {path.name}, line {index + 1}: time_s must be finite")
        kind = Kind(job.width, job.height, job.steps, job.num_images)
        prompt = nearest_prompt(job.text_tokens, rng)
        due_s = (arrival.time_s - trace[0].time_s) / speed
        plan.append(Planned(index, kind, prompt, first_seed + 100 * index, due_s))
    return plan
