"""The comparison: warm-up and times alone, then rounds in which each gets the same requests."""

import argparse
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from krea2_bench.compare.figures import Figure, compare_points, latency_of_a_request
from krea2_bench.compare.pictures import compare_pictures
from krea2_bench.compare.server_under_test import Interrupted, Result, ServerUnderTest, TurnsOf
from krea2_bench.load.alone import measure_alone
from krea2_bench.load.arguments import load_of
from krea2_bench.load.endpoint import Endpoint
from krea2_bench.load.outcome import Outcome
from krea2_bench.load.plan import Planned
from krea2_bench.load.points import LoadRunner, Point
from krea2_bench.load.summary import Slo, summarise


class Comparison:
    """Loads servers in turn, and compares them.

    Args:
        args: of the command, with one mix.
        sides: the last one is the baseline.

    Attributes:
        mix: of its requests.
        complete: whether it ran to its end.
        rounds_done: whole ones.
        has_turns: whether a server has told its units of work.
    """

    def __init__(self, args: argparse.Namespace, sides: Sequence[ServerUnderTest]) -> None:
        self.args = args
        self.mix, _, self._points = load_of(args)
        self.complete = False
        self.rounds_done = 0
        self.has_turns = False
        self._sides = sides
        self._results = {side.server.name: Result() for side in sides}
        self._load_runner = LoadRunner()

    async def run(self) -> None:
        """All of it, until it is interrupted.

        Raises:
            EndpointError, ServerError: a server fails as a whole; the rounds before stay.
        """
        turns = [TurnsOf(side.turn_log) for side in self._sides]
        try:
            with self._load_runner.handle_signals(), suppress(Interrupted):
                await self._run()
        finally:
            self._drop_rounds(self.rounds_done)
            for side, told in zip(self._sides, turns, strict=True):
                found = told.copy(self._path(f"{side.server.name}.turns.jsonl"))
                self.has_turns = self.has_turns or found

    async def _run(self) -> None:
        for side in self._sides:
            async with self._up(side) as url:
                await self._measure_alone(side, url)
        if self._load_runner.interrupted:
            return
        if self.args.load is not None:
            capacity = self._capacity()
            arrivals, burstiness = self.args.arrivals, self.args.burstiness
            self._points = [
                Point(arrivals, load * capacity, burstiness=burstiness) for load in self.args.load
            ]
        with self._path("jsonl").open("wb") as lines:
            for number in range(self.args.rounds):
                await self._run_round(number, lines)
                if self._load_runner.interrupted:
                    return
                self.rounds_done += 1
        self.complete = True

    def _up(self, side: ServerUnderTest) -> AbstractAsyncContextManager[str]:
        return side.up(lambda: self._load_runner.interrupted)

    def result(self) -> dict[str, Any]:
        """Everything that came of it, for JSON."""
        *others, baseline = self._results
        slo = self._slo()
        points = []
        for number, point in enumerate(self._points):
            found: dict[str, Any] = point.as_dict()
            if self.args.load is not None:
                found["load"] = self.args.load[number]
            outcomes = {name: results.outcomes[number] for name, results in self._results.items()}
            found["sides"] = {
                name: summarise(_together(rounds), slo) for name, rounds in outcomes.items()
            }
            found["figures"] = {
                name: [
                    figure.as_dict()
                    for figure in compare_points(outcomes[name], outcomes[baseline], slo)
                ]
                for name in others
            }
            points.append(found)
        return {
            "servers": {
                side.server.name: {
                    "command": side.server.typed,
                    "alone_s": self._results[side.server.name].alone_s,
                }
                for side in self._sides
            },
            "baseline": baseline,
            "rounds": self.rounds_done,
            "slo_s": slo.by_work,
            "overall": {name: self._overall(name, baseline).as_dict() for name in others},
            "pictures": {
                name: compare_pictures(
                    self._results[name].pictures,
                    self._results[baseline].pictures,
                    self.args.min_psnr,
                )
                for name in others
            },
            "points": points,
        }

    async def _measure_alone(self, side: ServerUnderTest, url: str) -> None:
        args = self.args
        async with Endpoint(side.options(url)) as endpoint:
            await endpoint.find_model()
            self._results[side.server.name].alone_s = await measure_alone(
                self._load_runner, endpoint, self.mix, args.warm_up, max(1, args.alone), args.seed
            )

    async def _run_round(self, number: int, lines: BinaryIO) -> None:
        """Every point to every server; who is first changes."""
        plan = load_of(self.args, number)[1]
        sides, places = deque(self._sides), range(len(self._points))
        sides.rotate(number)
        if self.args.one_at_a_time:
            for side in sides:
                async with self._up(side) as url:
                    await self._warm_up(side, url)
                    for place in places:
                        await self._run_point(side, url, number, place, plan, lines)
            return
        for place in places:
            for side in sides:
                await self._run_point(side, side.url, number, place, plan, lines)
            sides.rotate(1)

    async def _warm_up(self, side: ServerUnderTest, url: str) -> None:
        async with Endpoint(side.options(url)) as endpoint:
            await endpoint.find_model()
            warm_up = max(1, self.args.warm_up)
            await measure_alone(self._load_runner, endpoint, self.mix, warm_up, 0, self.args.seed)

    async def _run_point(
        self,
        side: ServerUnderTest,
        url: str,
        number: int,
        place: int,
        plan: Sequence[Planned],
        lines: BinaryIO,
    ) -> None:
        if self._load_runner.interrupted:
            return
        point, name = self._points[place], side.server.name
        results = self._results[name]

        def keep(index: int, pictures: tuple[np.ndarray, ...]) -> None:
            if index < self.args.pictures:
                results.pictures[index] = pictures

        def write(outcome: Outcome) -> None:
            lines.write(outcome.line(place, side=name, round=number, began_at=began_at))
            lines.flush()

        first = number == 0 and place == 0
        async with Endpoint(side.options(url), keep if first else None) as endpoint:
            await endpoint.find_model()
            began_at = time.time()
            outcomes = await self._load_runner.run(
                endpoint,
                point.timed(plan, self.args.seed),
                f"round {number + 1}, {point.name}, {name}",
                point.concurrency,
                write,
            )
        results.outcomes[place].append(outcomes)

    def _drop_rounds(self, number: int) -> None:
        """Those from this one on: one was broken off, so the servers had different requests."""
        for results in self._results.values():
            for outcomes in results.outcomes.values():
                del outcomes[number:]

    @property
    def _baseline(self) -> Result:
        return list(self._results.values())[-1]

    def _capacity(self) -> float:
        """Requests of the mix a second that the baseline does one after the other."""
        alone_s = self._baseline.alone_s
        weight = sum(kind.weight for kind in self.mix)
        return weight / sum(kind.weight * alone_s[kind.work] for kind in self.mix)

    def _slo(self) -> Slo:
        """The same for all: multiples of what requests take alone on the baseline."""
        if self.args.slo_s:
            return Slo({kind.work: self.args.slo_s for kind in self.mix})
        return Slo.scaled(self._baseline.alone_s, self.args.slo_scale)

    def _overall(self, name: str, baseline: str) -> Figure:
        ours, theirs = self._results[name].outcomes, self._results[baseline].outcomes
        return latency_of_a_request(
            [(ours[number], theirs[number]) for number in range(len(self._points))]
        )

    def _path(self, suffix: str) -> Path:
        return Path(self.args.output.with_name(f"{self.args.output.name}.{suffix}"))


def _together(rounds: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes of all rounds on one time line, one round behind the other."""
    found: list[Outcome] = []
    offset = 0.0
    for outcomes in rounds:
        found += [outcome.shifted(offset) for outcome in outcomes]
        offset = max((o.done_s for o in found), default=0.0)
    return found
