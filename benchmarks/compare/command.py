"""krea2-bench compare: two or more servers, the same requests, interleaved."""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.compare.match import Match, Side
from benchmarks.compare.servers import PRESETS, Server, ServerError, parse_server, running
from benchmarks.compare.table import table
from benchmarks.load.arguments import (
    OptionError,
    add_load_options,
    endpoint_options,
    load_of,
    positive_int,
    positive_list,
)
from benchmarks.load.command import INTERRUPTED_STATUS, PACKAGES, settings
from benchmarks.load.points import allow_many_connections

_PACKAGES = (*PACKAGES, "sglang", "torch")
_TURN_LOG = "KREA2_SRT_TURN_LOG"


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
        "by side and are never under load at the same time.",
    )
    add = parser.add_argument
    add("--server", action="append", default=[], metavar="NAME[=…]", help="twice or more")
    add("--checkpoint", default="krea/Krea-2-Turbo", metavar="MODEL", help="stands for {model}")
    add("--rounds", type=positive_int, default=5, help="of all points and servers (default 5)")
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


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    servers = _servers(args)
    if args.load is not None and args.rate is not None:
        raise OptionError("--load and --rate: only one of them can be given")
    load_of(args)  # before anything is started
    allow_many_connections()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="krea2-bench.") as scratch, ExitStack() as stack:
        sides = [_side(args, server, Path(scratch)) for server in servers]
        if not args.one_at_a_time:
            # Loading takes long, and mostly on one core each.
            for side in sides:
                print(f"starting {side.server.name}", file=sys.stderr, flush=True)
                side.url = stack.enter_context(side.start())
        match = Match(args, sides)
        complete = asyncio.run(match.play())
    if not match.rounds_played:
        print("krea2-bench compare: interrupted before there was a result", file=sys.stderr)
        return INTERRUPTED_STATUS
    result = {"run": settings(args, match.mix, _PACKAGES), "complete": complete, **match.result()}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.output.with_name(f"{args.output.name}.json").write_text(f"{text}\n", encoding="utf-8")
    print(table(result))
    return 0 if complete else INTERRUPTED_STATUS


def _servers(args: argparse.Namespace) -> list[Server]:
    servers = [parse_server(text) for text in args.server]
    names = [server.name for server in servers]
    if len(names) < 2:
        raise ServerError("--server: give two or more, for example --server ours --server sglang")
    if len(set(names)) < len(names):
        raise ServerError(f"--server: two are called {max(names, key=names.count)}")
    if args.one_at_a_time and any(server.url for server in servers):
        raise ServerError("--one-at-a-time: servers that run already cannot be stopped")
    return servers


def _side(args: argparse.Namespace, server: Server, scratch: Path) -> Side:
    folder = scratch / server.name
    folder.mkdir()
    environment = {}
    if server.environment.get("KREA2_SRT") != "off":
        log = args.output.with_name(f"{args.output.name}.{server.name}.turns.jsonl")
        log.unlink(missing_ok=True)
        environment[_TURN_LOG] = str(log.resolve())
    checkpoint = Path(args.checkpoint)
    model = str(checkpoint.resolve()) if checkpoint.is_dir() else args.checkpoint

    @contextmanager
    def start() -> Iterator[str]:
        with running(server, model, folder, environment) as url:
            yield url

    return Side(server, start, lambda url: endpoint_options(args, url))
