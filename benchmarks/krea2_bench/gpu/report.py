"""The findings as JSON, and as a page of tables."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from krea2_bench.gpu import assumptions
from krea2_bench.gpu.clocks import Clocks
from krea2_bench.gpu.record import Header
from krea2_bench.gpu.rows import FAILED, LEFT_OUT, SKIPPED, Findings, Missing, Row
from krea2_bench.gpu.targets import TARGETS

_TITLE = """\
# On a GPU

Written by `python benchmarks/gpu.py`. Random weights of the released architecture, prompts of 64
tokens, times in wall milliseconds with the device waited for: median (least to most). The floor of
a step is the larger of its arithmetic at the rate of a large matrix product and of its weights at
the rate of a large copy, both measured in the same run.
"""

_TARGETS = """
## What must be reached on an H200

The estimates are arithmetic, at the rates that `benchmarks/krea2_bench/gpu/cost.py` assumes;
nothing of them was measured. Where a server can choose a graph or eager launches, the
faster one counts.
"""

_TARGET_HEAD = ("figure", "wanted", "estimate", "of which", "measured", "reached")


def write(folder: Path, findings: Findings | None, header: Header) -> None:
    """Write ``gpu.json`` and ``gpu.md``; each is whole at any time.

    Args:
        folder: where they go.
        findings: what was measured; None where there was no GPU.
        header: of what it was measured on, see `krea2_bench.gpu.record`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = findings or Findings()
    stored = {
        **header,
        "targets": [
            dict(zip(("what", *_TARGET_HEAD[1:]), line, strict=True))
            for line in _target_lines(findings)
        ],
        "rows": [row.entry() | {"share": row.share} for row in known.rows],
        "missing": [missing.entry() for missing in known.missing],
        "done": known.done,
    }
    _replace(folder / "gpu.json", json.dumps(stored, indent=1) + "\n")
    _replace(folder / "gpu.md", markdown(findings, header))


def markdown(findings: Findings | None, header: Header) -> str:
    """The page."""
    machine = header.get("machine") or {}
    found = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [_TITLE, f"Machine: {found or 'none: no GPU was at hand'}.\n"]
    if commit := (header.get("sources") or {}).get("commit"):
        parts.append(f"Commit: {commit[:12]}.\n")
    parts.append(_TARGETS)
    parts.append(_table(_TARGET_HEAD, _target_lines(findings)))
    if findings is None:
        return "\n".join(parts)
    if broken := list(assumptions.lines(findings)):
        parts.append("\n## Steps, by what they are made of\n")
        parts.append(_table(assumptions.HEAD, broken))
    for part in dict.fromkeys(row.part for row in findings.rows):
        rows = [row for row in findings.rows if row.part == part]
        parts.append(f"\n## {part[0].upper()}{part[1:]}\n")
        head = ("what", "measured", "floor", "share", "how", "clocks", "")
        parts.append(_table(head, map(_cells, rows)))
    for why, title in (
        (FAILED, "What failed"),
        (SKIPPED, "What there was no time for"),
        (LEFT_OUT, "What does not run here"),
    ):
        some = [missing for missing in findings.missing if missing.why == why]
        if some:
            parts.append(f"\n## {title}\n")
            parts += map(_missing, some)
    return "\n".join(parts)


def _target_lines(findings: Findings | None) -> list[tuple[str, ...]]:
    return [(t.what, t.wanted, t.estimate, t.of_which, *t.verdict(findings)) for t in TARGETS]


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.low is None else f" ({row.low:.4g} to {row.high:.4g})"
    floor = "" if row.floor is None else f"{row.floor:.4g}"
    share = "" if row.share is None else f"{row.share:.0%}"
    measured = f"{row.value:.4g} {row.unit}{spread}"
    return row.what, measured, floor, share, row.how, _clocks(row.clocks), row.note


def _clocks(clocks: Clocks | None) -> str:
    if clocks is None:
        return ""
    return f"{clocks.sm_mhz:.0f} / {clocks.memory_mhz:.0f} MHz, {clocks.power_w:.0f} W"


def _missing(missing: Missing) -> str:
    name = f"{missing.part}, {missing.what}" if missing.what else missing.part
    trace = missing.trace if missing.why == FAILED else ""  # of the others the file has it
    lines = "".join(f"\n      {line}" for line in trace.splitlines())
    return f"- {name}: {missing.reason}{lines and chr(10) + lines}\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
