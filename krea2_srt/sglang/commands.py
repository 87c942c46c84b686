"""What the user can mend ends SGLang's commands with one line, in place of a page of its frames."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from krea2_srt.cli.errors import USAGE_ERROR
from krea2_srt.errors import first_line
from krea2_srt.sglang.served import serves_krea2

logger = logging.getLogger(__name__)

USERS = (ValueError, OSError)
"""What SGLang raises for a value that cannot be, or a file that is not there or cannot be got."""

GENERATE, SERVE = "generate", "serve"


def is_command(*names: str) -> bool:
    """Whether this process is `sglang` with a subcommand of these names, and no program of a
    user's that has SGLang as a library: there errors are the program's to handle.
    """
    return Path(sys.argv[0]).name == "sglang" and sys.argv[1:2] in ([name] for name in names)


@contextmanager
def ending_in_a_line(*kinds: type[Exception], what: str = "") -> Iterator[None]:
    """End the process with what is wrong. The exit code says that another start would end the same
    way; `--log-level debug` shows where it happened.

    Args:
        kinds: of errors.
        what: said before it.
    """
    try:
        yield
    except kinds as error:
        logger.debug("krea2-srt: the command ends", exc_info=True)
        print(f"krea2-srt: error: {what}{text_of(error)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def generate(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of ``DiffGenerator.generate``, which checks the request of the command."""
    if not (is_command(GENERATE) and serves_krea2(self.server_args)):
        return original(self, *args, **kwargs)
    with ending_in_a_line(*USERS):
        return original(self, *args, **kwargs)


@contextmanager
def workers_that_say_why() -> Iterator[None]:
    """While SGLang starts its workers: one that has ended with its reason needs no frames of the
    process that waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        # SGLang's only word of how a worker ended is this text.
        if not (is_command(GENERATE, SERVE) and f"(exit code {USAGE_ERROR})" in str(error)):
            raise
        raise SystemExit(USAGE_ERROR) from None


def text_of(error: Exception) -> str:
    """The first line of what SGLang says, without its class where it says anything."""
    text = str(error).strip()
    return text.splitlines()[0] if text else first_line(error)
