"""The match: warm-up and times alone, then rounds in which every side gets the same requests."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.compare.figures import Rounds, compare_points, latency_of_a_request
from benchmarks.compare.pictures import compare_pictures
from benchmarks.compare.servers import Server
from benchmarks.load.alone import measure_alone
from benchmarks.load.arguments import load_of
from benchmarks.load.endpoint import Endpoint, EndpointOptions
from benchmarks.load.mix import Kind
from benchmarks.load.outcome import Outcome
from benchmarks.load.points import Player, Point
from benchmarks.load.summary import Slo, summarise


@dataclass
class Side:
    """A server in the match.

    Attributes:
        server: as it was given.
        start: starts it; its value is the URL.
        options: how requests are sent to a URL.
        url: of it, while it runs.
        alone_s: what requests take alone, by their work.
        pictures: of the first requests of the first round, by index.
        outcomes: by point, then by round.
    """

    server: Server
    start: Callable[[], AbstractContextManager[str]]
    options: Callable[[str], EndpointOptions]
    url: str = ""
    alone_s: dict[str, float] = field(default_factory=dict)
    pictures: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    outcomes: defaultdict[int, list[list[Outcome]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def up(self) -> AbstractContextManager[str]:
        """The server, started if it is not running."""
        return nullcontext(self.url) if self.url else self.start()


class Match:
    """Plays and compares.

    Args:
        args: of the command.
        sides: the last one is the baseline.
    """

    def __init__(self, args: argparse.Namespace, sides: Sequence[Side]) -> None:
        self.mix: tuple[Kind, ...]
        self.mix, _, self._points = load_of(args)
        self.sides = sides
        self.rounds_played = 0
        self._args = args
        self._player = Player()
        self._lines_path = args.output.with_name(f"{args.output.name}.jsonl")

    async def play(self) -> bool:
        """All of it; returns False if that was interrupted."""
        with self._player.heeding_interrupts():
            for side in self.sides:
                with side.up() as url:
                    await self._measure_alone(side, url)
            if self._player.interrupted:
                return False
            if self._args.load is not None:
                capacity = self._capacity(self.sides[-1])
                arrivals, burstiness = self._args.arrivals, self._args.burstiness
                self._points = [
                    Point(arrivals, load * capacity, burstiness=burstiness)
                    for load in self._args.load
                ]
            with self._lines_path.open("wb") as lines:
                for number in range(self._args.rounds):
                    await self._play_round(number, lines)
                    if self._player.interrupted:
                        self._drop_round(number)
                        return False
                    self.rounds_played += 1
        return True

    def result(self) -> dict[str, Any]:
        """Everything that came of it, for JSON."""
        baseline = self.sides[-1]
        slo = self._slo()
        points = []
        for number, point in enumerate(self._points):
            found: dict[str, Any] = point.as_dict()
            if self._args.load is not None:
                found["load"] = self._args.load[number]
            found["sides"] = {
                side.server.name: summarise(_together(side.outcomes[number]), slo)
                for side in self.sides
            }
            found["figures"] = {
                side.server.name: [
                    figure.as_dict()
                    for figure in compare_points(
                        side.outcomes[number], baseline.outcomes[number], slo
                    )
                ]
                for side in self.sides[:-1]
            }
            points.append(found)
        return {
            "servers": {
                side.server.name: {"command": side.server.typed, "alone_s": side.alone_s}
                for side in self.sides
            },
            "baseline": baseline.server.name,
            "rounds": self.rounds_played,
            "slo_s": slo.by_work,
            "overall": {
                side.server.name: self._overall(side).as_dict() for side in self.sides[:-1]
            },
            "pictures": {
                side.server.name: compare_pictures(
                    side.pictures, baseline.pictures, self._args.min_psnr
                )
                for side in self.sides[:-1]
            },
            "points": points,
        }

    async def _measure_alone(self, side: Side, url: str) -> None:
        args = self._args
        async with Endpoint(side.options(url)) as endpoint:
            await endpoint.find_model()
            side.alone_s = await measure_alone(
                self._player, endpoint, self.mix, args.warm_up, max(1, args.alone), args.seed
            )

    async def _play_round(self, number: int, lines: Any) -> None:
        """Every point to every side; who is first changes."""
        plan = load_of(self._args, number)[1]
        for place in range(len(self._points)) if not self._args.one_at_a_time else (None,):
            order = list(self.sides)
            shift = (number + (place or 0)) % len(order)
            for side in order[shift:] + order[:shift]:
                if self._player.interrupted:
                    return
                with side.up() as url:
                    places = range(len(self._points)) if place is None else (place,)
                    if place is None:  # just started
                        await self._warm_up(side, url)
                    for at in places:
                        await self._play_point(side, url, number, at, plan, lines)

    async def _warm_up(self, side: Side, url: str) -> None:
        async with Endpoint(side.options(url)) as endpoint:
            await endpoint.find_model()
            warm_up = max(1, self._args.warm_up)
            await measure_alone(self._player, endpoint, self.mix, warm_up, 0, self._args.seed)

    async def _play_point(
        self, side: Side, url: str, number: int, place: int, plan: Sequence[Any], lines: Any
    ) -> None:
        point, name = self._points[place], side.server.name

        def keep(index: int, pictures: tuple[np.ndarray, ...]) -> None:
            if index < self._args.pictures:
                side.pictures[index] = pictures

        def write(outcome: Outcome) -> None:
            lines.write(outcome.line(place, side=name, round=number))

        first = number == 0 and place == 0
        async with Endpoint(side.options(url), keep if first else None) as endpoint:
            await endpoint.find_model()
            outcomes = await self._player.play(
                endpoint,
                point.timed(plan, self._args.seed + number),
                f"round {number + 1}, {point.name}, {name}",
                point.concurrency,
                write,
            )
        side.outcomes[place].append(outcomes)

    def _drop_round(self, number: int) -> None:
        """It was broken off: the sides have had different requests."""
        for side in self.sides:
            for outcomes in side.outcomes.values():
                del outcomes[number:]

    def _capacity(self, side: Side) -> float:
        """Requests of the mix a second, one after the other."""
        weight = sum(kind.weight for kind in self.mix)
        seconds = sum(kind.weight * side.alone_s[kind.work] for kind in self.mix)
        return weight / seconds

    def _slo(self) -> Slo:
        """The same for all: multiples of what requests take alone on the baseline."""
        if self._args.slo_s:
            return Slo({kind.work: self._args.slo_s for kind in self.mix})
        return Slo.scaled(self.sides[-1].alone_s, self._args.slo_scale)

    def _overall(self, side: Side) -> Any:
        rounds: list[tuple[Rounds, Rounds]] = [
            (side.outcomes[number], self.sides[-1].outcomes[number])
            for number in range(len(self._points))
        ]
        return latency_of_a_request(rounds)


def _together(rounds: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes of all rounds on one time line, one round behind the other."""
    found, offset = [], 0.0
    for outcomes in rounds:
        found += [outcome.shifted(offset) for outcome in outcomes]
        offset = max((o.done_s for o in found), default=0.0)
    return found
