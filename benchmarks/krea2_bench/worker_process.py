"""A child process that does a job of `krea2_bench.workers`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from krea2_bench.workers import Message
from krea2_srt.sglang.served import SWITCH
from krea2_srt.testing.processes import ChildProcess

LIMIT_S = 600.0
"""Longest wait for an answer, or for a command; decoders have it for each round."""

GRACE_S = 20.0
"""Time to end for a worker that is no longer needed."""


class WorkerProcess(ChildProcess):
    """A context in which a job runs, with all that it starts.

    Args:
        job: of `krea2_bench.workers`.
        model: checkpoint folder.
        scratch: folder for its log and what children share.
        settings: of the job.
        switch: on or off, whether SGLang takes our runner.
        name: of its log; job and switch by default.
        environment: variables in place of `warm_environment`'s, whose byte code is only this run's.
    """

    def __init__(
        self,
        job: str,
        model: Path,
        scratch: Path,
        settings: Message,
        switch: str = "on",
        name: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "krea2_bench.workers", job, str(model)]
        super().__init__(
            [*command, json.dumps(settings)],
            scratch / f"{name or f'{job}_{switch}'}.log",
            environment=warm_environment(scratch, switch) if environment is None else environment,
            talks=True,
            apart=True,
            # SGLang's engine may have to be killed; the answers are there.
            exit_code=None,
            end_s=GRACE_S,
        )

    def ask(self, question: Message) -> Message:
        """Send a line of JSON and wait for the answer; raises like `answer`."""
        self.send_line(json.dumps(question))
        return self.answer()

    def answer(self, limit_s: float = LIMIT_S) -> Message:
        """Wait for its next line of JSON; `ProcessError` if it ends first, or takes longer."""
        return dict(json.loads(self.read_line(limit_s)))


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
