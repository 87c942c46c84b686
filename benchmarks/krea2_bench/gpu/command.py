"""The command line of ``benchmarks/gpu.py``."""

import argparse
import os
import signal
import time
from pathlib import Path

import torch

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.gpu import record, report
from krea2_bench.gpu.parts import PARTS
from krea2_bench.gpu.rows import FAILED
from krea2_bench.gpu.run import NoGPU, Run


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of the command line."""
    found = benchmark_parser("krea2_bench.gpu", doc)
    for action in found._actions:
        if action.dest == "output":
            action.default = None
            action.help = (
                "where rows.jsonl and the tables go (default $OUT where that is set, else the "
                "folder that is resumed, else benchmarks/results)"
            )
    found.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}"
    )
    found.add_argument(
        "--budget-s",
        type=count,
        metavar="SECONDS",
        help="of the whole run; what does not fit any more is skipped, and the table says so",
    )
    found.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="take over the rows of an earlier run of the same sources, machine and versions, "
        "and run what it has not done",
    )
    found.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="measure nothing: write the tables of the rows in DIR again",
    )
    found.add_argument(
        "--tune",
        action="store_true",
        help="search the launches of the kernels first, and write them beside the results",
    )
    found.add_argument(
        "--plan", action="store_true", help="measure nothing: write the targets as not measured"
    )
    found.add_argument(
        "--smoke", action="store_true", help="try the program on the CPU, with a tiny model"
    )
    return found


def main(doc: str | None, argv: list[str] | None, started: float | None) -> int:
    """Run the parts; returns 1 if something failed.

    Args:
        doc: of the command.
        argv: the command line.
        started: when the budget began, on the machine's own clock; now unless told.
    """
    command = parser(doc)
    args = command.parse_args(argv)
    started = time.monotonic() if started is None else started
    output = args.output or Path(
        os.environ.get("OUT") or args.resume or args.report or "benchmarks/results"
    )
    if args.plan:
        report.write(output, None, {})
        return 0
    if args.report is not None:
        return _report(command, args.report, output)
    if args.resume is not None and record.read(args.resume) is None:
        command.error(f"--resume: there is no {record.NAME} in {args.resume}")
    if args.tune and args.smoke:
        command.error("--tune: a search on a CPU says nothing of a GPU")
    # As Ctrl-C: the child is ended, and the table written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a fork inherits of more than one is broken
    try:
        run = Run(output, args.smoke, args.only, args.budget_s, started, args.tune)
        findings = run(args.resume)
    except NoGPU as error:
        command.error(f"{error}; --smoke tries the program, --plan writes what would be measured")
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, before)
    print((output / "gpu.md").read_text())
    failed = {missing.part for missing in findings.missing if missing.why == FAILED}
    return 1 if failed else 0


def _report(command: argparse.ArgumentParser, source: Path, output: Path) -> int:
    found = record.read(source)
    if found is None:
        command.error(f"--report: there is no {record.NAME} in {source}")
    header, entries = found
    report.write(output, record.findings_of(entries), header)
    return 0
