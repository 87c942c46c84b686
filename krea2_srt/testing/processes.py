"""Processes that are started to be tested, measured or broken, and never outlive that."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from krea2_srt.errors import Krea2Error

START_S = 180.0
"""A generous start, on a busy machine."""

END_S = 180.0
"""A generous end: a server finishes what it has accepted."""

_POLL_S = 0.05
_SHOWN = 3000


class ProcessError(Krea2Error):
    """A process failed; the message says which one and ends with its log."""


class ChildProcess:
    """A context in which a command runs. Left without an error, it checks how the process ended.

    Args:
        command: its command line.
        log: file for its stdout and stderr.
        folder: that it runs in; this process's by default.
        environment: variables beside those of this process.
        talks: whether stdout is a pipe too, as stdin is, for `send_line` and `read_line`. Such a
            process ends when its stdin is closed; any other one when it is told to, by SIGTERM.
        apart: whether Ctrl-C is kept from it, and all that it has started ends with it.
        pass_fds: descriptors that it inherits.
        exit_code: that it must end with; None is any, and it may also have to be killed.
        end_s: that it may take to end.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        talks: bool = False,
        apart: bool = False,
        pass_fds: Sequence[int] = (),
        exit_code: int | None = 0,
        end_s: float = END_S,
    ) -> None:
        self.log_file = log
        self._command = command
        self._folder = folder
        self._environment = {**os.environ, **(environment or {})}
        self._talks = talks
        self._apart = apart
        self._pass_fds = pass_fds
        self._exit_code = exit_code
        self._end_s = end_s

    def start(self) -> None:
        """Start it; OSError if there is no such command."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self._talks else log,
                stderr=log,
                cwd=self._folder,
                env=self._environment,
                text=True,
                start_new_session=self._apart,
                pass_fds=self._pass_fds,
            )

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        in_time = self._end(asked_kindly=self._talks and error is None)
        if error is not None or self._exit_code is None:
            return
        if not in_time:
            raise self.error(f"did not end within {self._end_s:g} s")
        if self._process.returncode != self._exit_code:
            raise self.error(f"ended with exit code {self._process.returncode}")

    def wait_until_up(self) -> None:
        """What a subclass waits for before its context begins."""

    @property
    def name(self) -> str:
        """That of its log."""
        return self.log_file.stem

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def error(self, what: str = "failed") -> ProcessError:
        """To raise when it has failed."""
        # A server that was asked for minutes whether it is there has said little else.
        log = re.sub(r"^.*GET /(health|ready)\b.*\n", "", self.log, flags=re.M)
        return ProcessError(f"{self.name} {what}; the end of its log:\n{log[-_SHOWN:]}")

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, when it has ended; `ProcessError` if that takes too long."""
        timeout_s = self._end_s if timeout_s is None else timeout_s
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.error(f"has not ended after {timeout_s:g} s") from None

    def finish(self, timeout_s: float) -> None:
        """Wait until it has done its work; `ProcessError` if it fails or that takes too long."""
        if self.wait(timeout_s) != (self._exit_code or 0):
            raise self.error()

    def wait_until(
        self, condition: Callable[[], object], what: str, timeout_s: float = START_S
    ) -> None:
        """Ask until the answer is yes; `ProcessError` if it ends before that, or never is.

        Args:
            what: is true then.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.ended:
                code = self._process.returncode
                raise self.error(f"ended with exit code {code}, and this never was: {what}")
            if time.monotonic() > deadline:
                raise self.error(f"did not get there within {timeout_s:g} s: {what}")
            time.sleep(_POLL_S)

    def wait_for_line(self, pattern: re.Pattern[str], timeout_s: float) -> re.Match[str]:
        """Wait until its log has this; raises like `wait_until`."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found.extend(pattern.finditer(self.log))
            return bool(found)

        self.wait_until(seen, f"its log has {pattern.pattern!r}", timeout_s)
        return found[0]

    def send_line(self, line: str) -> None:
        """To its stdin. What has ended already shows when an answer is read."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def read_line(self, timeout_s: float) -> str:
        """The next line of its stdout; `ProcessError` if it ends or dawdles, upon which it ends."""
        assert self._process.stdout is not None
        deadline = threading.Timer(timeout_s, self._process.kill)
        deadline.start()
        try:
            line = self._process.stdout.readline()
        finally:
            deadline.cancel()
        if not line:
            raise self.error()
        return line.rstrip("\n")

    def _end(self, asked_kindly: bool) -> bool:
        """Whether it ended without being killed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not asked_kindly and not self.ended:
            self.terminate()
        try:
            self._process.wait(self._end_s)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            if self._apart:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)


def installed(command: str) -> str:
    """A command that is installed beside this Python, whose environment need not be active."""
    beside = Path(sys.executable).parent / command
    return str(beside) if os.sep not in command and beside.exists() else command


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A port for each name. Somebody else may still take one before it is bound again."""
    with ExitStack() as stack:
        ports = {}
        for name in names:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports[name] = probe.getsockname()[1]
        return ports
