"""The findings as JSON, and as a page of tables."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.rows import Findings, Row
from benchmarks.on_gpu.targets import TARGETS

_TITLE = """\
# On a GPU

Written by `python -m benchmarks.gpu`. Random weights of the released architecture, prompts of 64
tokens, times in wall milliseconds with the device waited for: median (least to most). The floor of
a step is the larger of its arithmetic at the rate of a large matrix product and of its weights at
the rate of a large copy, both measured in the same run.
"""


def write(folder: Path, findings: Findings | None, machine: dict[str, Any]) -> None:
    """Write ``gpu.json`` and ``gpu.md``.

    Args:
        folder: where they go.
        findings: what was measured; None where there was no GPU.
        machine: what it was measured on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) | {"share": row.share} for row in findings.rows] if findings else []
    targets = [
        dict(zip(("what", "wanted", "measured", "reached"), line, strict=True))
        for line in _target_lines(findings)
    ]
    failures = findings.failures if findings else {}
    stored = {"machine": machine, "targets": targets, "rows": rows, "failures": failures}
    (folder / "gpu.json").write_text(json.dumps(stored, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(findings, machine))


def markdown(findings: Findings | None, machine: dict[str, Any]) -> str:
    """The page."""
    found = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [_TITLE, f"Machine: {found or 'none: no GPU was at hand'}.\n"]
    parts.append("## What must be reached on an H200\n")
    parts.append(
        _table(("figure", "at least / at most", "measured", "reached"), _target_lines(findings))
    )
    if findings is None:
        return "\n".join(parts)
    for part in dict.fromkeys(row.part for row in findings.rows):
        rows = [row for row in findings.rows if row.part == part]
        parts.append(f"\n## {part.capitalize()}\n")
        parts.append(_table(("what", "measured", "floor", "share", ""), map(_cells, rows)))
    if findings.failures:
        parts.append("\n## What failed\n")
        parts += [f"- {part}: {reason}\n" for part, reason in findings.failures.items()]
    return "\n".join(parts)


def _target_lines(findings: Findings | None) -> list[tuple[str, str, str, str]]:
    return [(t.what, t.wanted, *t.verdict(findings)) for t in TARGETS]


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.low is None else f" ({row.low:.3g} to {row.high:.3g})"
    floor = "" if row.floor is None else f"{row.floor:.3g}"
    share = "" if row.share is None else f"{row.share:.0%}"
    return row.what, f"{row.value:.3g} {row.unit}{spread}", floor, share, row.note


def _table(head: tuple[str, ...], lines: Any) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(rows) + "\n"
