"""One line and exit code 2 for what the user can mend."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from krea2_srt.errors import Krea2Error

USAGE_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


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
