"""Starts of an engine whose weights are on a slow disk: read early, late, and not ahead at all.

``python -m krea2_bench.cold_start --model DIR``, where DIR is a checkpoint that
``krea2-demo-model`` has written; a copy of it gets 2 GB of zeros. Leaves a table and all figures in
``benchmarks/results``.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.cold_start.checkpoint import write_large_checkpoint
from krea2_bench.cold_start.worker import READINGS
from krea2_bench.provenance import provenance
from krea2_bench.worker_process import warm_environment
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError
from krea2_srt.model.on_disk import weight_files
from krea2_srt.testing.processes import ChildProcess, ProcessError, free_ports

MODULE = "krea2_bench.cold_start"
_PACKAGES = ("krea2-srt", "torch", "sglang", "safetensors")

PROMISED_S = 3.0
"""At most so much more than the longer of imports and reading."""

_LIMIT_S = 900.0
_READY = re.compile(
    r"ready ([\d.]+) s after its process began: imports ([\d.]+) s, loading ([\d.]+) s "
    r"\(([\d.]+) s of it waiting for files\), warm-up ([\d.]+) s; "
    r"beside them ([\d.]+) GB were read in ([\d.]+) s"
)
"""The engine's own account of its start."""


@dataclass(frozen=True)
class Start:
    """One start, in seconds since the process began where nothing else is said.

    Attributes:
        rate: of the disk in MB/s; 0 is the machine's own.
        reading: of `READINGS`.
        ready_s: until requests are taken.
        imports_s, loading_s, warm_up_s: its stages.
        waited_s: of loading, for files.
        read_gb, reading_s: what was read ahead, and how long that took.
        disk_gb: what the process has had from the disk.
    """

    rate: int
    reading: str
    ready_s: float
    imports_s: float
    loading_s: float
    waited_s: float
    warm_up_s: float
    read_gb: float
    reading_s: float
    disk_gb: float

    @property
    def over_s(self) -> float:
        """By how much it is later than the longer of imports and reading."""
        return self.ready_s - max(self.imports_s, self.reading_s)


def start(folder: Path, checkpoint: Path, rate: int, reading: str) -> Start:
    """Start an engine and end it when it is ready.

    Raises:
        ProcessError: it does not come up.
    """
    files = weight_files(str(checkpoint))
    for file in files:
        drop_from_memory(file)
    reader, writer = os.pipe()
    ports = free_ports(["scheduler", "http"])
    command = [sys.executable, "-m", "krea2_bench.cold_start.worker", str(rate), reading]
    command += ["--ready-fd", str(writer), "--parent-pid", str(os.getpid())]
    command += ["--model-path", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--scheduler-port", str(ports["scheduler"]), "--port", str(ports["http"])]
    try:
        with ChildProcess(
            command,
            folder / f"{rate}-{reading}.log",
            environment=warm_environment(folder, "on"),
            pass_fds=[writer],
            exit_code=None,
        ) as engine:
            found = engine.wait_for_line(_READY, _LIMIT_S)
            disk_gb = read_from_disk(engine.pid) / 1e9
    finally:
        os.close(reader)
        os.close(writer)
    ready, imports, loading, waited, warm_up, read_gb, reading_s = map(float, found.groups())
    print(f"{rate} MB/s, {reading}: {found[0]}", file=sys.stderr)
    return Start(
        rate, reading, ready, imports, loading, waited, warm_up, read_gb, reading_s, disk_gb
    )


def drop_from_memory(file: Path) -> None:
    """Have the kernel forget what it has of a file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_from_disk(pid: int) -> int:
    """Bytes that a process has caused to be read from disks; 0 where the kernel does not say."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="demo checkpoint")
    add("--gigabytes", type=float, default=2.0, help="of zeros (default 2)")
    add("--rates", default="100,0", help="MB/s of the disk, 0 as it is (default 100,0)")
    add("--rounds", type=count, default=3, help="of starts (default 3)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # As Ctrl-C: contexts are left, so children end and files go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors(MODULE):
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        rates = [int(rate) for rate in args.rates.split(",")]
        try:
            with tempfile.TemporaryDirectory(prefix="cold_start.") as scratch:
                folder = Path(scratch)
                checkpoint = folder / "krea-2-large"
                write_large_checkpoint(args.model, checkpoint, args.gigabytes)
                size_gb = sum(f.stat().st_size for f in weight_files(str(checkpoint))) / 1e9
                # Compiles bytecode, and times the engine's packs.
                start(folder, checkpoint, 0, "early")
                starts = [
                    start(folder, checkpoint, rate, reading)
                    for _ in range(args.rounds)
                    for rate in rates
                    # A rate holds for what is read ahead, and not for page faults.
                    for reading in (list(READINGS)[:2] if rate else READINGS)
                ]
        except ProcessError as error:
            sys.exit(f"{MODULE}: error: {error}")
        typed = sys.argv[1:] if argv is None else argv
        run = provenance(["python", "-m", MODULE, *typed], _PACKAGES)
        results = {"run": run, "size_gb": size_gb, "starts": [asdict(each) for each in starts]}
        page = table(results)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "cold_start.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "cold_start.md").write_text(page)
    print(page)
    return 0


def table(results: Mapping[str, Any]) -> str:
    """The page."""
    run, size = results["run"], results["size_gb"]
    groups: dict[tuple[int, str], list[Start]] = {}
    for values in results["starts"]:
        each = Start(**values)
        groups.setdefault((each.rate, each.reading), []).append(each)
    rows = [_row(rate, reading, starts, size) for (rate, reading), starts in groups.items()]
    made = f"`{run['command']}`, {run['date'][:10]}, {run['cpu']}, {run['cpu_count']} cores"
    load = f"Load average at the end: {run['load_average']}."
    readings = "; ".join(f"*{name}*: {what}" for name, what in READINGS.items())
    stages = "imports | reading | loading | waiting in it | warm-up | ready | over | from disk"
    return f"""# Starts from a slow disk

{made}.
An engine's process, as krea2-serve starts it, loads {size:.2f} GB that the kernel has forgotten.
The disk is held to a rate, or as fast as it is. {readings}. Promised is that the engine is ready
{PROMISED_S:g} s after the longer of imports and reading. Medians of the starts, in seconds; *over*
is by how much it was later than that longer one, with the least and the most, and *from disk* what
the process had from the disk, in times of the files' size. {load}

| disk | read | {stages} |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def _row(rate: int, reading: str, starts: Sequence[Start], size_gb: float) -> str:
    def middle(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2]

    over = sorted(each.over_s for each in starts)
    names = ("imports_s", "reading_s", "loading_s", "waited_s", "warm_up_s", "ready_s")
    cells = [f"{middle([getattr(each, name) for each in starts]):.1f}" for name in names]
    cells.append(f"{middle(over):.1f} ({over[0]:.1f} to {over[-1]:.1f})")
    cells.append(f"{middle([each.disk_gb for each in starts]) / size_gb:.2f}")
    disk = f"{rate} MB/s" if rate else "its own rate"
    return f"| {disk} | {reading} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
