"""krea2-bench micro: what scheduling, packing, caches, HTTP and the start cost."""

import argparse
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from krea2_bench.arguments import count
from krea2_bench.micro.history import HistoryError, last_of, read_history, record, regressions
from krea2_bench.micro.timing import Timed
from krea2_bench.provenance import cpu_name, provenance, typed
from krea2_srt.errors import CheckpointError
from krea2_srt.threads import limit_spinning

_PACKAGES = ("krea2-srt", "torch", "fastapi", "uvicorn", "pydantic")
PARTS = ("scheduling", "packing", "prompts", "http", "start", "threads")

ATTEMPTS = 5
"""A regression must show in all of them, since one busy moment is none; a part that has shown none
is not measured again."""


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "micro", help="small benchmarks", allow_abbrev=False, description=__doc__
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("demo-model/krea-2-demo"), metavar="DIR")
    add("--rounds", type=count, default=15, help="of each (default 15)")
    add("--record", type=Path, metavar="FILE", help="append to a history, with times of the start")
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail if a ratio is worse than its bound, or by 15 %% than the last in a history of "
        "the same kind of processor",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    if not args.checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder {args.checkpoint} does not exist")
    limit_spinning()
    if args.check:
        return _check(args)
    found = measure(args.checkpoint, args.rounds)
    print(table(found))
    if args.record:
        from krea2_bench.micro.start_up import start_up

        with tempfile.TemporaryDirectory() as folder:
            stages = start_up(Path(folder), args.checkpoint.resolve())
        print("start, s: " + ", ".join(f"{name} {s:.2f}" for name, s in stages.items()))
        rounded = {name: round(seconds, 3) for name, seconds in stages.items()}
        run = provenance(typed("krea2-bench"), _PACKAGES)
        record(args.record, run, found, {"start_up_s": rounded})
    return 0


def _check(args: argparse.Namespace) -> int:
    cpu = cpu_name()
    last = last_of(read_history(args.check), cpu)
    if last is None:
        print(f"{args.check} has no entry of a processor named {cpu!r}: nothing to compare with.")
        print(f"On one that nobody else uses, krea2-bench micro --record {args.check} adds it.")
        print(table(measure(args.checkpoint, args.rounds)))
        return 0
    committed, references = last["ratios"], last["references"]
    best: dict[str, float] = {}
    bounds: dict[str, float] = {}
    again: Collection[str] = PARTS
    for _ in range(ATTEMPTS):
        parts: dict[str, list[str]] = {}
        for part in again:
            found = measure(args.checkpoint, args.rounds, [part])
            parts[part] = [timed.name for timed in found]
            for timed in found:
                if references.get(timed.name, timed.reference) != timed.reference:
                    raise HistoryError(
                        f"{args.check}: {timed.name} is a ratio to {references[timed.name]} there, "
                        f"and to {timed.reference} now; record it again"
                    )
                best[timed.name] = min(timed.ratio, best.get(timed.name, timed.ratio))
                if timed.bound is not None:
                    bounds[timed.name] = timed.bound
        worse = regressions(committed, best, bounds)
        again = [part for part, names in parts.items() if worse.keys() & names]
        if not again:
            break
    print(f"committed on {cpu}, {last['run']['date'][:10]}:")
    for name, ratio in best.items():
        known = f"committed {committed[name]:.3g}" if name in committed else "not committed"
        bound = f", wanted at most {bounds[name]:.3g}" if name in bounds else ""
        print(f"{name}: {ratio:.3g}, {known}{bound}")
    for name, text in sorted(worse.items()):
        print(f"REGRESSION {name}: {text}")
    return 1 if worse else 0


def measure(checkpoint: Path, rounds: int, parts: Collection[str] = PARTS) -> list[Timed]:
    """Some parts, by default all; some two minutes.

    Args:
        checkpoint: folder of the model.
        rounds: of each.
        parts: names out of `PARTS`.
    """
    from krea2_bench.micro import http, runner, scheduling, threads

    fewer = max(2, rounds // 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works: dict[str, Callable[[], list[Timed]]] = {
            "scheduling": lambda: [scheduling.scheduler_turn(fewer)],
            "packing": lambda: runner.packing(20 * rounds),
            "prompts": lambda: [runner.cached_prompt(checkpoint, rounds)],
            "http": lambda: [http.request(folder, rounds)],
            "start": lambda: [http.start(folder, fewer)],
            "threads": lambda: threads.waiting(folder, checkpoint, fewer),
        }
        return [timed for part in parts for timed in works[part]()]


def table(found: list[Timed]) -> str:
    """For a terminal."""
    rows = [("what", "ms", "reference", "ms", "ratio")]
    for timed in found:
        times = (f"{timed.ms:.4g}", timed.reference, f"{timed.reference_ms:.4g}")
        rows.append((timed.name, *times, f"{timed.ratio:.3g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
