"""krea2-bench compare: two or more servers, the same requests, interleaved."""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from krea2_bench.arguments import count
from krea2_bench.compare.comparison import Comparison, ServerUnderTest
from krea2_bench.compare.servers import PRESETS, Server, ServerError, parse_server, running
from krea2_bench.compare.table import table
from krea2_bench.load.arguments import (
    OptionError,
    add_load_options,
    endpoint_options,
    load_of,
    positive_list,
)
from krea2_bench.load.command import INTERRUPTED_STATUS, PACKAGES, settings
from krea2_bench.load.mix import MixError
from krea2_bench.load.points import allow_many_connections

_PACKAGES = (*PACKAGES, "sglang", "torch")
_TURN_LOG = "KREA2_SRT_TURN_LOG"
_NAMED_MIX = re.compile(r"([\w.-]+)=(.*)")


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "compare",
        help="start servers and compare them",
        allow_abbrev=False,
        description=__doc__,
        epilog="A server is NAME=COMMAND, where {port} (and {port2}, …) stands for a free port, "
        "{model} for --checkpoint and {scratch} for a folder; NAME=URL, if it runs already; or one "
        f"of {', '.join(PRESETS)}. The last one is what the others are compared to. They run side "
        "by side and are never under load at the same time. Each --mix NAME=… has results of its "
        "own, in PREFIX.NAME.json.",
    )
    add = parser.add_argument
    add("--server", action="append", default=[], metavar="NAME[=…]", help="twice or more")
    add("--checkpoint", default="krea/Krea-2-Turbo", metavar="MODEL", help="stands for {model}")
    add("--rounds", type=count, default=5, help="of all points and servers (default 5)")
    add(
        "--load",
        type=positive_list,
        metavar="X[,X…]",
        help="in place of --rate: multiples of what the last server can do one after the other",
    )
    add(
        "--one-at-a-time",
        action="store_true",
        help="where two do not fit: start each anew for each of its rounds",
    )
    add(
        "--pictures",
        type=int,
        default=32,
        metavar="N",
        help="requests whose pictures are compared (default 32)",
    )
    add("--min-psnr", type=float, default=40.0, metavar="DB", help="of equal pictures (default 40)")
    add(
        "--output",
        type=Path,
        default=Path("krea2-bench-compare"),
        metavar="PREFIX",
        help="results go to PREFIX.jsonl and PREFIX.json (default %(default)s)",
    )
    add_load_options(parser, requests=40)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """The subcommand; returns its exit code."""
    servers = _servers(args)
    if args.load is not None and args.rate is not None:
        raise OptionError("--load and --rate: only one of them can be given")
    studies = _studies(args)
    for study in studies:  # before anything is started
        load_of(study)
    allow_many_connections()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="krea2-bench.") as scratch, ExitStack() as stack:
        sides = [_side(args, server, Path(scratch)) for server in servers]
        if not args.one_at_a_time:
            _start_all(sides, stack)
        results = _run(studies, sides)
    measured = [one for one in results if one.result]
    if not measured:
        print("krea2-bench compare: interrupted before there was a result", file=sys.stderr)
    # With all cores to itself.
    if any(one.comparison.has_turns for one in measured) and (ceilings := _ceilings()):
        for one in measured:
            one.result["ceilings"] = ceilings
            one.write()
    return (
        0
        if len(results) == len(studies) and results[-1].comparison.complete
        else INTERRUPTED_STATUS
    )


@dataclass
class _Result:
    """A comparison, how it was made, and what came of it; nothing, without a whole round."""

    comparison: Comparison
    run: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)

    def end(self) -> None:
        """It is over, or broken off: work out what came of it."""
        if self.comparison.rounds_done:
            run = {"run": self.run, "complete": self.comparison.complete, "ceilings": None}
            self.result = run | self.comparison.result()
            self.write()
            print(f"{self._path}\n{table(self.result)}\n", flush=True)

    def write(self) -> None:
        text = json.dumps(self.result, indent=1, ensure_ascii=False)
        self._path.write_text(f"{text}\n", encoding="utf-8")

    @property
    def _path(self) -> Path:
        output: Path = self.comparison.args.output
        return output.with_name(f"{output.name}.json")


def _run(studies: Sequence[Namespace], sides: Sequence[ServerUnderTest]) -> list[_Result]:
    """One comparison after the other, until one is interrupted; each is written when it is over."""
    results: list[_Result] = []
    for study in studies:
        comparison = Comparison(study, sides)
        results.append(_Result(comparison, settings(study, comparison.mix, _PACKAGES)))
        try:
            asyncio.run(comparison.run())
        finally:
            results[-1].end()
        if not comparison.complete:
            break
    return results


def _servers(args: Namespace) -> list[Server]:
    servers = [parse_server(text) for text in args.server]
    names = [server.name for server in servers]
    if len(names) < 2:
        raise ServerError("--server: give two or more, for example --server ours --server sglang")
    if len(set(names)) < len(names):
        raise ServerError(f"--server: two are called {max(names, key=names.count)}")
    if args.one_at_a_time and any(server.url for server in servers):
        raise ServerError("--one-at-a-time: servers that run already cannot be stopped")
    return servers


def _studies(args: Namespace) -> list[Namespace]:
    """The options of each mix."""
    mixes = args.mix or [None]
    if len(mixes) == 1 and not _NAMED_MIX.fullmatch(mixes[0] or ""):
        return [args]
    found = {}
    for text in mixes:
        if (named := _NAMED_MIX.fullmatch(text)) is None:
            raise MixError(f"mix: of several, each needs a name, NAME=…; {text!r} has none")
        output = args.output.with_name(f"{args.output.name}.{named[1]}")
        found[named[1]] = Namespace(**{**vars(args), "mix": [named[2]], "output": output})
    if len(found) < len(mixes):
        raise MixError("mix: two have the same name")
    return list(found.values())


def _side(args: Namespace, server: Server, scratch: Path) -> ServerUnderTest:
    folder = scratch / server.name
    folder.mkdir()
    checkpoint = Path(args.checkpoint)
    model = str(checkpoint.resolve()) if checkpoint.is_dir() else args.checkpoint
    turn_log = folder / "turns.jsonl"
    # Servers that are not ours do not look at it.
    start = partial(running, server, model, folder, {_TURN_LOG: str(turn_log)})
    return ServerUnderTest(server, start, partial(endpoint_options, args), turn_log)


def _start_all(sides: Sequence[ServerUnderTest], stack: ExitStack) -> None:
    """One after the other: what a server times at its start, another must not disturb."""
    for side in sides:
        print(f"waiting for {side.server.name}", file=sys.stderr, flush=True)
        server = stack.enter_context(side.start())
        server.wait_until_ready()
        side.url = server.url


def _ceilings() -> dict[str, float] | None:
    """What the machine does at best, so that a report can say how near each step comes to it."""
    if find_spec("torch") is None:
        return None
    command = [sys.executable, "-m", "krea2_bench.ceilings"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(json.loads(found.stdout)) if found.returncode == 0 else None
