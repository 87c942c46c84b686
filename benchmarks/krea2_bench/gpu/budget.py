"""Which part runs next, in which child, and which ones there is no time for.

Knows no processes: children are started by whoever is given, and time is whatever clock is given.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from krea2_bench.gpu.rows import SKIPPED, Findings, Missing

RESERVE_S = 4.0
"""Left at the end of a budget, to end a child and to write the tables."""


@dataclass(frozen=True)
class PartPlan:
    """What has to be known of a part to find its place.

    Attributes:
        name: of it.
        group: parts of one group follow each other in one child, and share its models.
        seconds: that it takes, by estimate.
        deadline_s: after which its child is ended.
    """

    name: str
    group: str
    seconds: float
    deadline_s: float


class Worker(Protocol):
    """A child that runs parts, one after another."""

    @property
    def alive(self) -> bool:
        """Whether it can run another one."""

    def run(self, part: str, limit_s: float) -> None:
        """Run a part to its end, or to the child's; what fails is among the findings."""

    def close(self) -> None:
        """End it."""


class Session:
    """One run of the benchmark.

    Args:
        parts: the most valuable first.
        start_s: seconds that a new child takes to begin, by group.
        launch: starts a child.
        findings: where the parts leave what they find.
        clock: seconds since the run began.
        budget_s: of the whole run; None has no end.
        after: is called after every part.
    """

    def __init__(
        self,
        parts: Sequence[PartPlan],
        start_s: Callable[[str], float],
        launch: Callable[[], Worker],
        findings: Findings,
        clock: Callable[[], float],
        budget_s: float | None = None,
        after: Callable[[PartPlan], None] = lambda part: None,
    ) -> None:
        self._parts = parts
        self._start_s = start_s
        self._launch = launch
        self._findings = findings
        self._clock = clock
        self._budget_s = budget_s
        self._after = after
        self._worker: Worker | None = None
        self._group = ""

    def run(self, first: Worker | None = None) -> None:
        """Run what is not done yet and fits.

        Args:
            first: a child that has begun already, and has no models yet.
        """
        self._worker = first
        try:
            for part in self._order():
                needed = self._needed(part)
                if needed > self._left():
                    reason = f"takes about {needed:.0f} s, {max(0, self._left()):.0f} s were left"
                    self._findings.miss(Missing(part.name, "", SKIPPED, reason, by=part.name))
                    continue
                # The models are made within the first part of a child.
                limit_s = part.deadline_s + 2 * (needed - part.seconds)
                try:
                    worker = self._worker_for(part.group)
                except Exception as error:  # no child could be started; another one may be
                    self._findings.miss(replace(Missing.broken(part.name, "", error), by=part.name))
                else:
                    worker.run(part.name, min(limit_s, self._left()))
                self._after(part)
        finally:
            self._end_worker()

    def _order(self) -> list[PartPlan]:
        """Not those that are done; those that failed before come last."""
        done: Collection[str] = self._findings.done
        left = [part for part in self._parts if part.name not in done]
        return sorted(left, key=lambda part: self._findings.failed(part.name))

    def _needed(self, part: PartPlan) -> float:
        return part.seconds + (0.0 if self._shares(part.group) else self._start_s(part.group))

    def _left(self) -> float:
        if self._budget_s is None:
            return float("inf")
        return self._budget_s - RESERVE_S - self._clock()

    def _shares(self, group: str) -> bool:
        return self._worker is not None and self._worker.alive and self._group == group

    def _worker_for(self, group: str) -> Worker:
        worker = self._worker
        if worker is None or not worker.alive or self._group not in ("", group):
            self._end_worker()
            worker = self._worker = self._launch()
        self._group = group
        return worker

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._group = ""
