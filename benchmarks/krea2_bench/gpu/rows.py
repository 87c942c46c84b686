"""What is measured, as rows of one table, and what is missing in it, with the reason."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from krea2_bench.gpu.clocks import Clocks
from krea2_bench.gpu.timing import Timing
from krea2_srt.errors import first_line

Entry = dict[str, Any]
"""A line of ``rows.jsonl``: what it is under ``kind``, and its fields."""

FAILED, LEFT_OUT, SKIPPED = "failed", "left out", "skipped"
"""Why something is missing: it broke; this machine cannot do it; there was no time for it."""

_TRACE_LINES = 12


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
        how: it ran: on a graph or eagerly, and with which attention.
        span: seconds on the machine's own clock from which to which it ran; None if unknown.
        clocks: of the GPU in between; None where they are not known.
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
    how: str = ""
    span: tuple[float, float] | None = None
    clocks: Clocks | None = None

    @property
    def share(self) -> float | None:
        """Share of what the hardware allows; 1 is all."""
        if not self.floor or not self.value:
            return None
        return self.floor / self.value if self.better == "less" else self.value / self.floor

    def entry(self) -> Entry:
        """As a line of the file."""
        return {"kind": "row", **asdict(self)}

    @classmethod
    def of(cls, entry: Entry) -> "Row":
        """The row of such a line."""
        values = {name: value for name, value in entry.items() if name not in ("kind", "share")}
        if values.get("span") is not None:
            values["span"] = tuple(values["span"])
        if values.get("clocks") is not None:
            values["clocks"] = Clocks(**values["clocks"])
        return cls(**values)


@dataclass(frozen=True)
class Missing:
    """Something that was not measured.

    Attributes:
        part: of the benchmark.
        what: in it; empty for all that was left of it.
        why: one of `FAILED`, `LEFT_OUT` and `SKIPPED`.
        reason: in one line.
        trace: the end of the traceback.
        by: the part that ran then, where its rows stand under another's name.
    """

    part: str
    what: str
    why: str
    reason: str
    trace: str = ""
    by: str = ""

    @property
    def owner(self) -> str:
        """The part whose next run may find it."""
        return self.by or self.part

    def entry(self) -> Entry:
        """As a line of the file."""
        return {"kind": "missing", **asdict(self)}

    @classmethod
    def of(cls, entry: Entry) -> "Missing":
        """What such a line says."""
        return cls(**{name: value for name, value in entry.items() if name != "kind"})

    @classmethod
    def broken(cls, part: str, what: str, error: BaseException) -> "Missing":
        """Because of an error."""
        return cls(part, what, FAILED, first_line(error), trace_of(error))


def trace_of(error: BaseException) -> str:
    """The last lines of its traceback."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(lines[-_TRACE_LINES:])


@dataclass
class Findings:
    """All rows so far, what is missing, and which parts have ended well.

    Attributes:
        rows, missing: in the order in which they came.
        done: parts that ran to their end with nothing failed.
        running: the part that runs; empty between them.
        sink: is told of every entry.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    running: str = ""
    sink: Callable[[Entry], None] | None = None

    def add(self, row: Row) -> None:
        """One more row; a newer one of the same name takes the place of the older."""
        self.take(row.entry())
        if self.sink is not None:
            self.sink(row.entry())

    def miss(self, missing: Missing) -> None:
        """Something that is missing."""
        missing = replace(missing, by=missing.by or self.running)
        self.take(missing.entry())
        if self.sink is not None:
            self.sink(missing.entry())

    def take(self, entry: Entry) -> None:
        """An entry of the file, or of a child."""
        match entry["kind"]:
            case "row":
                row = Row.of(entry)
                places = {(r.part, r.what): place for place, r in enumerate(self.rows)}
                place = places.get((row.part, row.what))
                if place is None:
                    self.rows.append(row)
                else:
                    self.rows[place] = row
            case "missing":
                self.missing.append(Missing.of(entry))
            case "begin":  # again, maybe: what it could not do then it may do now
                self.running = entry["part"]
                self.missing = [m for m in self.missing if m.owner != entry["part"]]
                self.done = [part for part in self.done if part != entry["part"]]
            case "done":
                self.done.append(entry["part"])
                self.running = ""

    @contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """Note what fails, and go on: the rest still says something."""
        try:
            yield
        except Exception as error:
            self.miss(Missing.broken(part, what, error))
            check_device()

    @contextmanager
    def where_possible(self, part: str, what: str) -> Iterator[None]:
        """Note what this machine cannot do, and go on."""
        try:
            yield
        except Exception as error:
            reason, trace = first_line(error), trace_of(error)
            self.miss(Missing(part, what, LEFT_OUT, reason, trace))
            check_device()

    def failed(self, part: str) -> bool:
        """Whether something of a part broke."""
        return any(m.owner == part and m.why == FAILED for m in self.missing)

    def get(self, part: str, what: str) -> float | None:
        """A figure, if it was measured."""
        row = self.row(part, what)
        return None if row is None else row.value

    def row(self, part: str, what: str) -> Row | None:
        """A row, if it was measured."""
        return next((r for r in self.rows if (r.part, r.what) == (part, what)), None)


def check_device() -> None:
    """Raise if the GPU answers nothing any more: after some errors no call of a process does."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(
    part: str,
    what: str,
    timing: Timing,
    floor: float | None = None,
    note: str = "",
    how: str = "",
) -> Row:
    """A row of milliseconds."""
    low, high = timing.low, timing.high
    return Row(
        part, what, timing.median, "ms", low, high, floor, note=note, how=how, span=timing.span
    )


def rate(
    part: str,
    what: str,
    amount: float,
    timing: Timing,
    unit: str,
    ceiling: float | None = None,
    how: str = "",
) -> Row:
    """A row of ``amount`` per millisecond, and the time in its note."""
    return Row(
        part,
        what,
        amount / timing.median,
        unit,
        amount / timing.high,
        amount / timing.low,
        ceiling,
        better="more",
        note=milliseconds(timing.median),
        how=how,
        span=timing.span,
    )


def milliseconds(ms: float) -> str:
    """In words."""
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} us"


def with_clocks(row: Row, clocks: Clocks | None) -> Row:
    """The same with the GPU's clocks."""
    return replace(row, clocks=clocks)
