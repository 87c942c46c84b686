"""The committed history of the ratios, and whether new ones are worse."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from krea2_bench.micro.timing import Timed
from krea2_srt.errors import Krea2Error

TOLERANCE = 1.15
"""Largest ratio of a ratio to the committed one. Times are never compared: machines differ."""

KEPT = 20
"""Entries of the history."""


class HistoryError(Krea2Error):
    """The history cannot be read; the message names the file."""


def read_history(path: Path) -> list[dict[str, Any]]:
    """Its entries, oldest first.

    Raises:
        HistoryError: there is none, or it is empty.
    """
    try:
        entries = list(json.loads(path.read_text(encoding="utf-8"))["history"])
        if entries and all(isinstance(entry["ratios"], dict) for entry in entries):
            return entries
    except OSError as error:
        raise HistoryError(
            f"{path}: {error.strerror}; krea2-bench micro --record writes it"
        ) from None
    except (ValueError, KeyError, TypeError):
        pass
    raise HistoryError(f"{path}: is no history of krea2-bench micro")


def last_of(entries: Sequence[Mapping[str, Any]], cpu: str) -> Mapping[str, Any] | None:
    """The last entry of a kind of processor; None if there is none.

    Ratios differ between kinds too, as that of an HTTP request does between those of the history.
    """
    return next((entry for entry in reversed(entries) if entry["run"].get("cpu") == cpu), None)


def record(
    path: Path, run: Mapping[str, Any], found: Sequence[Timed], more: Mapping[str, Any]
) -> None:
    """Append an entry."""
    entries = read_history(path) if path.exists() else []
    entry = {
        "run": dict(run),
        "ratios": {timed.name: round(timed.ratio, 4) for timed in found},
        "references": {timed.name: timed.reference for timed in found},
        "ms": {timed.name: round(timed.ms, 5) for timed in found},
        **more,
    }
    text = json.dumps({"history": [*entries, entry][-KEPT:]}, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def regressions(
    committed: Mapping[str, float], found: Mapping[str, float], bounds: Mapping[str, float]
) -> dict[str, str]:
    """What is worse than the committed ratios by more than `TOLERANCE`, or is missing, in words.

    Args:
        bounds: of those that may be worse than the committed ones up to here. One that was
            committed above its bound, on a machine that does not reach it, is compared like any.
    """
    worse = dict.fromkeys(committed.keys() - found.keys(), "is not measured any more")
    for name, ratio in found.items():
        if name in bounds and committed.get(name, 0.0) <= bounds[name]:
            if ratio > bounds[name]:
                worse[name] = f"{ratio:.3g}, and must be at most {bounds[name]:.3g}"
        elif name not in committed:
            worse[name] = "is not in the history; record it"
        elif ratio > TOLERANCE * committed[name]:
            worse[name] = f"{ratio:.3g} in place of {committed[name]:.3g}, "
            worse[name] += f"{ratio / committed[name] - 1:+.0%}"
    return worse
