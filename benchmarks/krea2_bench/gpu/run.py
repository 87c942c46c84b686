"""One run of the benchmark: children, budget, clocks and the file of rows, put together."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from krea2_bench.gpu import record, report, tune
from krea2_bench.gpu.budget import PartPlan, Session
from krea2_bench.gpu.children import START_S, Child, ChildEnded, Send
from krea2_bench.gpu.clocks import ClockSampler, nvidia_smi
from krea2_bench.gpu.context import Context
from krea2_bench.gpu.machine import machine
from krea2_bench.gpu.parts import PARTS, plans, start_s
from krea2_bench.gpu.record import Record
from krea2_bench.gpu.rows import Entry, Findings, Missing, Row
from krea2_bench.gpu.sources import sources
from krea2_srt.runner.allocator import use_expandable_segments

TRIAL_PATIENCE = 10.0
"""How much longer than on a GPU a part of a trial may take."""


class NoGPU(Exception):
    """There is none that CUDA can use."""


class Run:
    """One run.

    Args:
        output: folder of its rows and tables.
        smoke: on the CPU, with a tiny model.
        only: names of parts; None is all.
        budget_s: of the whole run; None has no end.
        started: when the budget began, on the machine's own clock.
        launches: whether to search the kernels' launches first.
    """

    def __init__(
        self,
        output: Path,
        smoke: bool,
        only: list[str] | None,
        budget_s: float | None,
        started: float,
        launches: bool = False,
    ) -> None:
        self._output = output
        self._smoke = smoke
        self._only = only
        self._budget_s = budget_s
        self._started = started
        self._launches = launches
        self._findings = Findings()
        self._header: record.Header = {}
        self._record: Record | None = None
        self._clocks = ClockSampler(None if smoke else nvidia_smi())

    def __call__(self, resumed: Path | None = None) -> Findings:
        """Run the parts.

        Args:
            resumed: folder of an earlier run, to go on from there.

        Raises:
            NoGPU: there is none, and this is no trial.
        """
        if self._smoke:
            # Once, not in every child; on a GPU it would ask CUDA what there is.
            from transformers import Qwen3VLTextModel  # noqa: F401
        first: Child | None = None
        try:
            try:
                first = self._child()
            except ChildEnded as error:
                raise NoGPU(str(error)) from None
            if first.hello["device"] is None:
                raise NoGPU("no CUDA GPU")
            self._begin(first.hello, resumed)
            if self._findings.rows:  # forked before they were read, and parts go by them
                first.close()
                first = None
            plan = plans(self._only, patience=TRIAL_PATIENCE if self._smoke else 1.0)
            if self._launches:
                plan.insert(0, tune.PLAN)
            session = Session(
                plan,
                start_s,
                self._launch,
                self._findings,
                self._elapsed,
                self._budget_s,
                self._after,
            )
            session.run(first)
        finally:
            if first is not None:
                first.close()
            self._clocks.close()
            if self._record is not None:
                self._write()
                self._record.close()
        return self._findings

    def _begin(self, found: dict[str, Any], resumed: Path | None) -> None:
        """Make the file of rows, with those of an earlier run where they are of the same kind."""
        self._header = {"smoke": self._smoke, "sources": sources(), "machine": found}
        taken: list[Entry] = []
        if resumed is not None and (earlier := record.read(resumed)) is not None:
            header, entries = earlier
            if reasons := record.differences(self._header, header):
                _say(f"nothing is taken over from {resumed}: {'; '.join(reasons)}")
            else:
                # What was skipped then is looked at again.
                taken = [e for e in entries if e.get("why") != report.SKIPPED]
                self._findings = record.findings_of(taken)
                _say(f"{len(self._findings.rows)} rows are taken over from {resumed}")
        self._record = Record(self._output, self._header, taken)
        self._findings.sink = self._record.append
        self._write()

    def _launch(self) -> Child:
        return self._child()

    def _child(self) -> Child:
        left = float("inf") if self._budget_s is None else self._budget_s - self._elapsed()
        return Child(self._serve, self._receive, self._watched, max(0.0, min(START_S, left)))

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _watched(self) -> list[tuple[int, Callable[[], None]]]:
        return [(file, self._clocks.read) for file in self._clocks.files]

    def _serve(self, send: Send) -> Callable[[str], bool]:
        """In the child."""
        if not self._smoke and not torch.cuda.is_available():
            send({"kind": "hello", "machine": {"device": None}})
            return lambda part: False
        device = torch.device("cpu" if self._smoke else "cuda:0")
        use_expandable_segments(device)  # as a server does
        torch.zeros(1, device=device)  # the context
        context = Context(device, self._smoke, replace(self._findings, sink=send))
        send({"kind": "hello", "machine": machine(device)})
        return lambda part: run_part(context, part, self._output)

    def _receive(self, entry: Entry) -> None:
        """In the parent: what a child, or nobody any more, says of a part."""
        assert self._record is not None
        if entry["kind"] == "row":
            row = Row.of(entry)
            entry = replace(row, clocks=self._clocks.between(row.span)).entry()
        self._findings.take(entry)
        self._record.append(entry)

    def _after(self, part: PartPlan) -> None:
        """Every part's end, so that a time limit loses nothing."""
        _say(f"{part.name}: after {self._elapsed():.1f} s")
        self._write()

    def _write(self) -> None:
        report.write(self._output, self._findings, self._header)


def run_part(context: Context, name: str, output: Path) -> bool:
    """Run a part in a child; whether the child can run another one."""
    findings = context.findings
    findings.take({"kind": "begin", "part": name})
    before = len(findings.missing)
    usable = True
    with torch.inference_mode():
        try:
            if name == tune.PLAN.name:
                tune.run(context, output)
            else:
                PARTS[name].run(context)
        except Exception as error:
            # The device may answer nothing any more, or be full: what follows begins anew.
            findings.miss(Missing.broken(name, "", error))
            usable = False
    well = all(missing.why != report.FAILED for missing in findings.missing[before:])
    assert findings.sink is not None
    findings.sink({"kind": "end", "part": name, "well": well, "usable": usable})
    return usable


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
