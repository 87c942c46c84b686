"""One line and exit code 2 for what the user can mend."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from krea2_srt import __version__
from krea2_srt.errors import Krea2Error, how_to_install

USAGE_ERROR = 2

_OURS = ("krea2_srt", "krea2_server", "krea2_bench")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_version(parser: argparse.ArgumentParser) -> None:
    """``--version``, of this package."""
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="print the version and exit",
    )


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn our errors and the file system's into a line on stderr and exit code 2."""
    try:
        yield
    except (Krea2Error, OSError) as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except RuntimeError as error:
        # torch.OutOfMemoryError, by name: torch may not be imported, and must not be for this.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"{command}: error: out of GPU memory; try a smaller size", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def needs_extra(command: str, extra: str) -> Iterator[None]:
    """End the process with a line where an import within finds a package missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if not missing or missing in _OURS:
            raise
        text = f"{command}: error: {missing} is not installed; {how_to_install(extra)}"
        print(text, file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
