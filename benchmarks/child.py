"""A child process of the benchmark that ends, with all that it started, when it is left."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.workers import Message
from krea2_srt.plugin import SWITCH

LIMIT_S = 600.0
"""Longest wait for an answer, or for a command; decoders have it for each round."""

GRACE_S = 20.0
"""Time to end for a child that is no longer needed."""


class ChildError(Exception):
    """A child failed; the message says which one and ends with its log."""


class Child:
    """A process that ends, with all that it started, when its context is left.

    Args:
        command: its command line.
        log: file for its stderr and, unless it answers, its stdout.
        environment: variables beside those of this process.
        answers: whether its stdout is for `answer`.
        ends: whether it ends by itself when its stdin is closed; a server is told to.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        answers: bool = False,
        ends: bool = True,
    ) -> None:
        self.log = log
        self._ends = ends
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else file,
                stderr=file,
                env={**os.environ, **(environment or {})},
                text=True,
                # A group of its own: Ctrl-C reaches us alone, and all of it can be ended at once.
                start_new_session=True,
            )

    @classmethod
    def worker(
        cls, job: str, model: Path, scratch: Path, settings: Message, switch: str = "on"
    ) -> Self:
        """A child that runs a job of `benchmarks.workers`.

        Args:
            switch: on or off, whether SGLang takes our runner.
        """
        command = [sys.executable, "-m", "benchmarks.workers", job, str(model)]
        log = scratch / f"{job}_{switch}.log"
        environment = warm_environment(scratch, switch)
        return cls([*command, json.dumps(settings)], log, environment, answers=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if error is None and self._ends:
            self._wait(GRACE_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._wait(GRACE_S)

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def finish(self) -> None:
        """Wait until it has ended by itself.

        Raises:
            ChildError: it failed, or took longer than ``LIMIT_S``.
        """
        self._wait(LIMIT_S)
        if self._process.returncode != 0:
            raise self.error()

    def ask(self, question: Message) -> Message:
        """Send a line of JSON and wait for the answer; raises like `answer`."""
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self, limit_s: float = LIMIT_S) -> Message:
        """Wait for its next line of JSON.

        Raises:
            ChildError: it ended without one, or took longer than ``limit_s``.
        """
        assert self._process.stdout is not None
        deadline = threading.Timer(limit_s, self._process.kill)
        deadline.start()
        try:
            line = self._process.stdout.readline()
        finally:
            deadline.cancel()
        if not line:
            raise self.error()
        return dict(json.loads(line))

    def error(self) -> ChildError:
        """To raise when it has failed."""
        end = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return ChildError(f"{self.log.stem} failed; the end of its log:\n{end}")

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def warm_environment(scratch: Path, switch: str) -> dict[str, str]:
    """For children that are started to be timed: byte code is kept, as on any machine that has run
    them before, and nobody waits for a model hub, which nothing here needs.

    Args:
        scratch: folder that they share.
        switch: on or off, whether SGLang takes our runner.
    """
    return {
        "PYTHONPYCACHEPREFIX": str(scratch / "pycache"),
        "PYTHONDONTWRITEBYTECODE": "",
        "HF_HUB_OFFLINE": "1",
        SWITCH: switch,
    }
