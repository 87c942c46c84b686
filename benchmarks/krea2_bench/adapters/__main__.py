"""What adapters cost: in a pack, at their first request, and for eight tenants with one each.

``python -m krea2_bench.adapters --model DIR`` on cores that nobody else uses; ten minutes. Leaves a
table and all samples in ``benchmarks/results``.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

from krea2_bench.adapters.files import write_adapter
from krea2_bench.adapters.http import Client
from krea2_bench.adapters.packs import pack_times
from krea2_bench.adapters.table import table
from krea2_bench.adapters.tenants import (
    TENANTS,
    by_request,
    by_switching,
    latencies,
    likeness,
    sequential_s,
)
from krea2_bench.arguments import benchmark_parser, count
from krea2_bench.compare.servers import PRESETS, parse_server, running
from krea2_bench.provenance import provenance
from krea2_srt.cli.errors import one_line_errors
from krea2_srt.errors import CheckpointError
from krea2_srt.testing.processes import ProcessError

MODULE = "krea2_bench.adapters"
_PACKAGES = ("krea2-srt", "torch", "sglang")


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    add("--rounds", type=count, default=15, help="of packs and of first requests (default 15)")
    add("--requests", type=count, default=48, help="of all tenants (default 48)")
    args = parser.parse_args(argv)
    with one_line_errors(MODULE):
        if not args.model.is_dir():
            raise CheckpointError(f"checkpoint folder {args.model} does not exist")
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = _measure(args.model.resolve(), Path(folder), args.rounds, args.requests)
        except ProcessError as error:
            sys.exit(f"{MODULE}: error: {error}")
        typed = sys.argv[1:] if argv is None else argv
        run = provenance(["python", "-m", MODULE, *typed], _PACKAGES)
        results = {"run": run, **found}
        page = table(results)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "adapters.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "adapters.md").write_text(page)
    print(page)
    return 0


def _measure(model: Path, folder: Path, rounds: int, requests: int) -> dict[str, Any]:
    packs = pack_times(model, folder, rounds)
    adapters = folder / "adapters"
    adapters.mkdir()
    files = [adapters / f"tenant-{number}.safetensors" for number in range(TENANTS)]
    for number, file in enumerate(files):
        write_adapter(model / "transformer", file, number)
    with ExitStack() as stack:
        ours = _started(stack, f"ours={PRESETS['ours']} --lora-dir {adapters}", model, folder)
        plain = _started(stack, f"plain={PRESETS['ours']}", model, folder)
        first = _first_requests(ours, files[0], rounds)
        base = _base_requests(ours, plain, files, rounds)
    with ExitStack() as stack:
        ours = _started(stack, f"ours={PRESETS['ours']} --lora-dir {adapters}", model, folder)
        theirs = _started(stack, "sglang", model, folder)
        tenants = _tenants(ours, theirs, files, requests)
    return {"packs": packs, "first": first, "base": base, "tenants": tenants}


def _started(stack: ExitStack, server: str, model: Path, folder: Path) -> Client:
    parsed = parse_server(server)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    process = stack.enter_context(running(parsed, str(model), scratch))
    process.wait_until_ready()
    client = Client(process.url)
    stack.callback(client.close)
    client.picture()
    return client


def _first_requests(client: Client, file: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of requests with an adapter that was never seen, and with the same again."""
    times: dict[str, list[float]] = {"disk": [], "device": []}
    for number in range(rounds):
        # Another file each time: by its content, an adapter that was there is known.
        new = file.with_name(f"new-{number}.safetensors")
        shutil.copy(file, new)
        with new.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(bytes([number]))
        times["disk"].append(round(client.seconds(new.stem) * 1e3, 1))
        times["device"].append(round(client.seconds(new.stem) * 1e3, 1))
    return times


def _base_requests(
    ours: Client, plain: Client, files: Sequence[Path], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of requests without adapters, of a server that has served some and of one that
    knows none, in turn.
    """
    for file in files:
        ours.picture(file.stem)
    times: dict[str, list[float]] = {"with adapters about": [], "without": []}
    for number in range(4 * rounds):
        order = [("with adapters about", ours), ("without", plain)]
        for name, client in order if number % 2 else reversed(order):
            times[name].append(round(client.seconds(seed=number) * 1e3, 1))
    return times


def _tenants(ours: Client, theirs: Client, files: Sequence[Path], requests: int) -> dict[str, Any]:
    same = likeness(ours, theirs, files)
    sequential_s(theirs, files, 1)
    for file in files:
        ours.picture(file.stem)
    alone = sequential_s(theirs, files, 2)
    interval_s = mean(alone)
    names = [file.stem for file in files]
    found: dict[str, Any] = {"ours": [], "sglang": []}
    for _ in range(2):
        found["ours"] += latencies(by_request(ours, names), requests // 2, interval_s)
        found["sglang"] += latencies(by_switching(theirs, files), requests // 2, interval_s)
    return {"likeness_db": same, "interval_s": interval_s, "sequential_s": alone, **found}


if __name__ == "__main__":
    sys.exit(main())
