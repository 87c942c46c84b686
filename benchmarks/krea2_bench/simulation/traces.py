"""Traces: what arrives when, sampled from a seed or replayed from a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from krea2_bench.arrivals import diurnal, gamma, poisson
from krea2_srt.request import MAX_TEXT_TOKENS, SUFFIX_TOKENS, ImageRequest

MEDIAN_PROMPT_TOKENS = 60.0
PROMPT_SPREAD = 0.7
"""Prompts have log-normal lengths: their median, and the deviation of their logarithm."""

PROMPT_GRID = 10
"""Lengths of prompts are multiples of this, so that few different requests exist."""

BURSTY_VARIATION = 3.0
"""Coefficient of variation of the times between bursty arrivals; that of Poisson ones is 1."""


@dataclass(frozen=True)
class Job:
    """What one client asks for.

    Attributes:
        width, height: pixels.
        steps: denoising steps.
        num_images: sequences.
        text_tokens: of the prompt, without the template's suffix.
    """

    width: int
    height: int
    steps: int = 8
    num_images: int = 1
    text_tokens: int = 60

    @property
    def size(self) -> str:
        """Its size class."""
        return f"{self.width}x{self.height}"

    @property
    def megapixels(self) -> float:
        return self.num_images * self.width * self.height / 1e6

    @cached_property
    def request(self) -> ImageRequest:
        # The engine's estimate takes four bytes to a token.
        prompt = "word" * self.text_tokens
        return ImageRequest(prompt, self.width, self.height, self.steps, num_images=self.num_images)


@dataclass(frozen=True)
class Arrival:
    """A job, and when it arrives (s)."""

    time_s: float
    job: Job


@dataclass(frozen=True)
class Share:
    """Part of a mix of jobs.

    Attributes:
        side: pixels of its square images.
        weight: share of the requests, relative to the other weights.
        steps: denoising steps.
        num_images: sequences of a request.
    """

    side: int
    weight: float
    steps: int = 8
    num_images: int = 1


DEFAULT_MIX = (Share(256, 40), Share(512, 30), Share(1024, 25), Share(2048, 5))

Process = Callable[[int, float, np.random.Generator], np.ndarray]
"""From a count, a mean rate (1/s) and a generator to sorted times of arrival (s)."""


def bursty(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Clusters and gaps."""
    return gamma(count, rate, rng, BURSTY_VARIATION**-2)


PROCESSES: dict[str, Process] = {"poisson": poisson, "bursty": bursty, "diurnal": diurnal}


def draw_jobs(count: int, mix: Sequence[Share], rng: np.random.Generator) -> list[Job]:
    """Jobs of a mix, with prompts of random length."""
    weights = np.array([share.weight for share in mix])
    chosen = rng.choice(len(mix), size=count, p=weights / weights.sum())
    lengths = MEDIAN_PROMPT_TOKENS * np.exp(PROMPT_SPREAD * rng.standard_normal(count))
    longest = (MAX_TEXT_TOKENS - SUFFIX_TOKENS) // PROMPT_GRID * PROMPT_GRID
    tokens = (lengths / PROMPT_GRID).round() * PROMPT_GRID
    tokens = tokens.clip(PROMPT_GRID, longest).astype(int)
    return [_job(mix[i], text) for i, text in zip(chosen.tolist(), tokens.tolist(), strict=True)]


@cache
def _job(share: Share, text_tokens: int) -> Job:
    """One object for equal jobs."""
    return Job(share.side, share.side, share.steps, share.num_images, text_tokens)


def draw_trace(
    process: str,
    mix: Sequence[Share],
    count: int,
    rate: Callable[[Sequence[Job]], float],
    seed: int,
) -> list[Arrival]:
    """A trace; the same for the same arguments.

    Args:
        process: one of `PROCESSES`.
        mix: of jobs.
        count: of arrivals.
        rate: mean arrivals a second, given all jobs. Traces that differ in nothing but the rate
            bring the same jobs in the same order.
        seed: of all that is random.
    """
    jobs_rng, times_rng = np.random.default_rng(seed).spawn(2)
    jobs = draw_jobs(count, mix, jobs_rng)
    times = PROCESSES[process](count, rate(jobs), times_rng)
    return [Arrival(time, job) for time, job in zip(times.tolist(), jobs, strict=True)]


def write_trace(trace: Sequence[Arrival], path: Path) -> None:
    """Write one line of JSON for each arrival."""
    lines = [json.dumps({"time_s": a.time_s, **asdict(a.job)}) for a in trace]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_trace(path: Path) -> list[Arrival]:
    """Read what `write_trace` wrote.

    Raises:
        ValueError: naming the line that is no arrival, or that arrives before the one above it.
    """
    trace: list[Arrival] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            arrival = Arrival(float(fields.pop("time_s")), Job(**fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
        if trace and arrival.time_s < trace[-1].time_s:
            raise ValueError(f"{path.name}, line {number}: arrives before the line above")
        trace.append(arrival)
    if not trace:
        raise ValueError(f"{path.name}: holds no arrival")
    return trace
