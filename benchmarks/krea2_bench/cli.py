"""krea2-bench: load tests, comparisons, reports and small benchmarks."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from krea2_srt.bytecode import write_bytecode
from krea2_srt.cli.errors import OneLineParser, add_version, needs_extra, one_line_errors

COMMAND = "krea2-bench"
SUBCOMMANDS = ("load", "compare", "report", "micro", "quality")


def main(argv: Sequence[str] | None = None) -> None:
    write_bytecode()
    parser = OneLineParser(prog=COMMAND, allow_abbrev=False, description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)
    with needs_extra(COMMAND, "bench"):
        for name in SUBCOMMANDS:
            import_module(f"krea2_bench.{name}.command").add_parser(commands)
    args = parser.parse_args(argv)
    # As Ctrl-C: contexts are left, so children end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors(COMMAND):
        sys.exit(args.run(args))
