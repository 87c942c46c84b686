"""The files of a load test."""

import json
import time
from pathlib import Path
from typing import Any, Self

from krea2_bench.load.outcome import Outcome
from krea2_bench.load.points import Point
from krea2_bench.load.summary import Slo, summarise


class Results:
    """Files that are valid at any time: a line for each request, and a summary after each point;
    a context.

    Args:
        prefix: of the files' names.
        run: how it was made.
        alone_s: what requests take alone, by their work.
        slo: the objective.
    """

    def __init__(
        self, prefix: Path, run: dict[str, Any], alone_s: dict[str, float], slo: Slo
    ) -> None:
        self.lines_path = prefix.with_name(prefix.name + ".jsonl")
        self.summary_path = prefix.with_name(prefix.name + ".json")
        self.summary: dict[str, Any] = {
            "run": run,
            "complete": False,
            "alone_s": alone_s,
            "slo_s": slo.by_work,
            "points": [],
        }
        self._lines = self.lines_path.open("wb")
        self._slo = slo
        self._point: Point | None = None
        self._outcomes: list[Outcome] = []
        self._began_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._point is not None:  # an error has broken it off
            self.end()
        self._write()
        self._lines.close()

    def begin(self, point: Point) -> None:
        self._point, self._outcomes, self._began_at = point, [], time.time()

    def add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._lines.write(outcome.line(len(self.summary["points"]), began_at=self._began_at))
        self._lines.flush()

    def end(self) -> None:
        """The point is over, or broken off."""
        assert self._point is not None
        figures = summarise(self._outcomes, self._slo)
        self.summary["points"].append(self._point.as_dict() | figures)
        self._point = None
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.summary, indent=1, ensure_ascii=False)
        scratch = self.summary_path.with_name(self.summary_path.name + ".part")
        scratch.write_text(f"{text}\n", encoding="utf-8")
        scratch.replace(self.summary_path)
