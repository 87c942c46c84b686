"""What is measured, as rows of one table."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.on_gpu.timing import Timing
from krea2_srt.errors import first_line


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: of the benchmark.
        what: was measured; with its part, unique.
        value: in ``unit``.
        unit: of it.
        low, high: the spread over repeats; None of what is no time.
        floor: what the hardware allows, in the same unit; None where nothing is known of it.
        better: "less" or "more".
        note: whatever a reader should know.
    """

    part: str
    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    better: str = "less"
    note: str = ""

    @property
    def share(self) -> float | None:
        """Of what the hardware allows; 1 is all."""
        if not self.floor or not self.value:
            return None
        return self.floor / self.value if self.better == "less" else self.value / self.floor


@dataclass
class Findings:
    """All rows so far, and what went wrong."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what fails, and go on: the rest still says something."""
        try:
            yield
        except Exception as error:
            self.failures[what] = first_line(error)

    def get(self, part: str, what: str) -> float | None:
        """A figure, if it was measured."""
        return next((r.value for r in self.rows if (r.part, r.what) == (part, what)), None)

    def row(self, part: str, what: str) -> Row | None:
        """A row, if it was measured."""
        return next((r for r in self.rows if (r.part, r.what) == (part, what)), None)


def timed(part: str, what: str, timing: Timing, floor: float | None = None, note: str = "") -> Row:
    """A row of milliseconds."""
    return Row(part, what, timing.median, "ms", timing.low, timing.high, floor, note=note)
