"""What a report is made of: the files of load tests and comparisons."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krea2_bench.load.outcome import Outcome
from krea2_srt.errors import Krea2Error

ALONE = "server"
"""The name of the only side of a load test."""


class ReportError(Krea2Error):
    """Results that cannot be reported; the message names the file."""


@dataclass(frozen=True)
class Line:
    """A request of a study.

    Attributes:
        outcome: what became of it.
        round: that it was sent in.
        began_at: when its point began, in seconds since the epoch.
    """

    outcome: Outcome
    round: int
    began_at: float


@dataclass(frozen=True)
class Turns:
    """An engine's turn log: its header, and its units of work in order."""

    header: dict[str, Any]
    entries: list[dict[str, Any]]


@dataclass
class Study:
    """A load test (with one side) or a comparison.

    Attributes:
        name: of its files.
        summary: its JSON.
        outcomes: by side, then by point; all rounds. Empty without the file of lines.
        turns: logs of the sides that have one.
    """

    name: str
    summary: dict[str, Any]
    outcomes: dict[str, dict[int, list["Line"]]] = field(default_factory=dict)
    turns: dict[str, Turns] = field(default_factory=dict)

    @property
    def sides(self) -> list[str]:
        """Names, the baseline last."""
        return list(self.summary.get("servers", {ALONE: None}))

    @property
    def points(self) -> list[dict[str, Any]]:
        return list(self.summary["points"])

    def figures_of(self, side: str, point: dict[str, Any]) -> dict[str, Any]:
        """A side's summary of a point."""
        found: dict[str, Any] = point["sides"][side] if "sides" in point else point
        return found

    @property
    def sizes(self) -> list[str]:
        """Sizes of all requests that were done, smallest first."""
        found: dict[str, None] = {}
        for point in self.points:
            for side in self.sides:
                found |= dict.fromkeys(self.figures_of(side, point)["latency_s"])
        return [size for size in found if size != "all"]


def read_study(prefix: Path) -> Study:
    """Read PREFIX.json, and PREFIX.jsonl and PREFIX.SIDE.turns.jsonl where they are.

    Raises:
        ReportError: the first is missing, or one of them is not what it should be.
    """
    prefix = prefix.with_suffix("") if prefix.suffix in (".json", ".jsonl") else prefix
    path = prefix.with_name(f"{prefix.name}.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        study = Study(prefix.name, summary)
        valid = bool(study.points) and all(
            "latency_s" in study.figures_of(side, point)
            for side in study.sides
            for point in study.points
        )
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ReportError(f"{path}: is no summary of a load test or comparison with a point")
    _read_lines(study, prefix.with_name(f"{prefix.name}.jsonl"))
    for side in study.sides:
        of_side = "" if side == ALONE else f".{side}"
        if (log := prefix.with_name(f"{prefix.name}{of_side}.turns.jsonl")).exists():
            began_at = [
                line.began_at for lines in study.outcomes.get(side, {}).values() for line in lines
            ]
            study.turns[side] = _read_turns(log, min(began_at, default=0.0))
    return study


def _read_lines(study: Study, path: Path) -> None:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            where, outcome = Outcome.parse(line)
            by_point = study.outcomes.setdefault(where.get("side", ALONE), {})
            found = Line(outcome, where.get("round", 0), where["began_at"])
            by_point.setdefault(where["point"], []).append(found)
        except (ValueError, TypeError, KeyError) as error:
            raise ReportError(f"{path}, line {number}: is no outcome: {error}") from None


def _read_turns(path: Path, since: float) -> Turns:
    """A log is appended to, by every start of its engine: what is older is of another test."""
    header: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found = json.loads(line)
            if "version" in found:
                header = found
            elif found["at"] >= since:
                entries.append(found)
        except (ValueError, TypeError, KeyError) as error:
            raise ReportError(f"{path}, line {number}: is no unit of work: {error}") from None
    return Turns(header, entries)
