"""Points: the loads that are put on a server one after the other."""

import asyncio
import math
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from krea2_bench.load.endpoint import Endpoint
from krea2_bench.load.generator import Generator, OnOutcome
from krea2_bench.load.outcome import Outcome
from krea2_bench.load.plan import Planned, at_rate
from krea2_bench.load.progress import Progress

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Point:
    """A load: a rate (open loop), a number of clients (closed loop), or as a trace says.

    Attributes:
        arrivals: ``poisson``, ``gamma``, ``constant``, ``trace`` or ``closed``.
        rate: requests a second; None unless open.
        concurrency: clients; None unless closed.
        burstiness: of gamma arrivals.
    """

    arrivals: str
    rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0

    @property
    def name(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} clients"
        if self.rate is None:
            return "trace"
        return "all at once" if self.rate == math.inf else f"{self.rate:.3g}/s"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        rate = "inf" if self.rate == math.inf else self.rate
        return {"arrivals": self.arrivals, "rate": rate, "concurrency": self.concurrency}

    def timed(self, plan: Sequence[Planned], seed: int) -> Sequence[Planned]:
        """A plan with times, where this point has a rate."""
        if self.rate is None:
            return plan
        return at_rate(plan, self.rate, self.arrivals, self.burstiness, seed)


class LoadRunner:
    """Runs points, and stops at the first Ctrl-C; the second is Python's own."""

    def __init__(self) -> None:
        self.interrupted = False
        self._generator: Generator | None = None

    async def run(
        self,
        endpoint: Endpoint,
        plan: Sequence[Planned],
        what: str,
        concurrency: int | None = None,
        on_outcome: OnOutcome = lambda _: None,
    ) -> list[Outcome]:
        """Send a plan; see `Generator.run`.

        Returns:
            Its outcomes, in the order of the plan; fewer, if this was interrupted.
        """
        outcomes: list[Outcome] = []

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            on_outcome(outcome)
            progress.show(outcome, generator.in_flight)

        generator = self._generator = Generator(endpoint, ended)
        with Progress(what, len(plan)) as progress:
            if self.interrupted:
                generator.stop()
            await generator.run(plan, concurrency)
        return sorted(outcomes, key=lambda outcome: outcome.index)

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """While this is entered, Ctrl-C or SIGTERM stops what is running; needs a running loop."""
        loop = asyncio.get_running_loop()

        def leave_to_python() -> None:
            for number in _INTERRUPTS:
                loop.remove_signal_handler(number)

        def stop() -> None:
            leave_to_python()
            self.interrupted = True
            if self._generator is not None:
                self._generator.stop()

        for number in _INTERRUPTS:
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            leave_to_python()


def allow_many_connections() -> None:
    """As many open files as this process may have: each request under way is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
