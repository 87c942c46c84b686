"""Children that run parts: forked, so that none pays for imports, and none breaks another.

The parent never touches CUDA, which no fork survives, and has a single thread. A child sends what
it finds down a pipe, line by line, and is ended when it takes too long.
"""

import ctypes
import faulthandler
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from krea2_bench.gpu.rows import FAILED, Entry, Missing

START_S = 90.0
"""Longest wait for a child's first word: it begins with a CUDA context."""

GRACE_S = 2.0
"""From SIGTERM, upon which a child writes where it is, to SIGKILL."""

_TRACE_LINES = 12
_PR_SET_PDEATHSIG = 1

Send = Callable[[Entry], None]
Serve = Callable[[Send], Callable[[str], bool]]
"""In the child: makes ready, sends ``{"kind": "hello", ...}`` itself, and returns what runs a part
by name. That returns whether the child can run another one.
"""


class ChildEnded(Exception):
    """A child ended before its first word."""


class Child:
    """A forked process that runs parts.

    Args:
        serve: what it does.
        receive: takes its entries here.
        watched: other descriptors to read while waiting, each with its function.
        start_s: longest wait for its first word.

    Attributes:
        hello: its first word.
    """

    def __init__(
        self,
        serve: Serve,
        receive: Callable[[Entry], None],
        watched: Callable[[], list[tuple[int, Callable[[], None]]]] = list,
        start_s: float = START_S,
    ) -> None:
        self._receive = receive
        self._watched = watched
        self._rest = b""
        self._over = False
        self._busy = False
        self._reason = ""
        self._ended: str | None = None
        self._where = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        commands, self._commands = os.pipe()
        self._found, found = os.pipe()
        # What is in a buffer here would be written by both.
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._commands)
            os.close(self._found)
            _be_child(serve, commands, found, self._where.fileno(), parent)
        os.close(commands)
        os.close(found)
        hello = self._until("hello", start_s)
        if hello is None:
            reason = f"{self._reason}\n{self._trace()}".strip()
            self.close()
            raise ChildEnded(reason)
        self.hello: dict[str, Any] = hello["machine"]

    @property
    def alive(self) -> bool:
        """Whether it can run another part."""
        self._wait(0)
        return self._ended is None and not self._over

    def run(self, part: str, limit_s: float) -> None:
        """Run a part; what it finds, and how it fails, goes to ``receive``."""
        self._receive({"kind": "begin", "part": part})
        with suppress(BrokenPipeError):
            os.write(self._commands, part.encode() + b"\n")
        self._busy = True
        end = self._until("end", limit_s)
        self._busy = False
        if end is None:
            self._receive(Missing(part, "", FAILED, self._reason, self._trace(), part).entry())
        elif not end["usable"]:
            self._over = True
        if end is not None and end["well"]:
            self._receive({"kind": "done", "part": part})
        if not self.alive:
            self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._where.closed:
            return
        os.close(self._commands)  # it ends by itself when there is nothing to wait for
        if not self._busy:
            self._wait(GRACE_S)
        self._end()
        os.close(self._found)
        self._where.close()

    def _until(self, kind: str, limit_s: float) -> Entry | None:
        """Receive entries up to one of a kind; None if the child ended, or was ended, before."""
        limit = time.monotonic() + limit_s
        while (left := limit - time.monotonic()) > 0:
            watched = dict(self._watched())
            ready, _, _ = select.select([self._found, *watched], [], [], min(left, 1.0))
            for file in ready:
                if file in watched:
                    watched[file]()
            if self._found in ready:
                some = os.read(self._found, 2**16)
                if not some:
                    self._wait(GRACE_S)
                    self._end()
                    self._reason = f"the child {self._ended}"
                    return None
                *lines, self._rest = (self._rest + some).split(b"\n")
                for line in lines:
                    entry = json.loads(line)
                    if entry["kind"] == kind:
                        return dict(entry)
                    self._receive(entry)
        self._reason = f"was ended after {limit_s:.3g} s"
        self._end()
        return None

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._ended is None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, number)
                self._wait(GRACE_S)

    def _wait(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while self._ended is None:
            found, status = os.waitpid(self._pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                name = signal.Signals(-code).name if code < 0 else ""
                self._ended = f"was ended by {name}" if name else f"ended with code {code}"
            elif time.monotonic() > limit:
                return
            else:
                time.sleep(0.005)

    def _trace(self) -> str:
        """Where it was when it was ended, as far as it could say."""
        self._where.seek(0)
        lines = self._where.read().decode(errors="replace").strip().splitlines()
        # A dump of a stack begins with where it was, a traceback ends with it.
        ends_with_it = bool(lines) and lines[0].startswith("Traceback")
        return "\n".join(lines[-_TRACE_LINES:] if ends_with_it else lines[:_TRACE_LINES])


def _be_child(serve: Serve, commands: int, found: int, where: int, parent: int) -> NoReturn:
    """All that a child does; it never returns into what the parent had been doing."""
    code = 1
    try:
        _end_with_the_parent(parent)
        os.dup2(2, 1)  # stdout is for the table
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.enable(where)
        faulthandler.register(signal.SIGTERM, where, all_threads=False, chain=True)

        def send(entry: Entry) -> None:
            data = json.dumps(entry).encode() + b"\n"
            while data:
                data = data[os.write(found, data) :]

        run = serve(send)
        with os.fdopen(commands) as lines:
            for line in lines:
                if not run(line.strip()):
                    break
        code = 0
    except BrokenPipeError:  # the parent has gone
        pass
    except BaseException:
        import traceback

        with os.fdopen(os.dup(where), "w") as file:
            traceback.print_exc(file=file)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_the_parent(parent: int) -> None:
    """Even when it is killed: nobody would read what is found."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
