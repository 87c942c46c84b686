"""krea2-serve as a process of its own, on a free port of loopback."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from krea2_srt.testing.processes import END_S, START_S, ChildProcess, installed

# In a log of text, or of JSON.
_LISTENING = re.compile(r"(?:INFO |\"message\": \")listening at (http://[^\s;\"]+)")
_READY = re.compile(r"(?:INFO |\"message\": \")ready: .* at (http://[^\s;\"]+)")


class Krea2Serve(ChildProcess):
    """A context in which a server runs, and is up; it must end with exit code 0.

    Args:
        folder: for its log and, unless told otherwise, its images.
        flags: of krea2-serve.
        wrapper: a command that runs it.
        program: krea2-serve itself; None is the one beside this Python.
        environment: variables that it gets too.
        ready: whether to wait until an engine is ready, not only until the server answers.
        start_s, end_s: that it may take to start, and to end.

    Attributes:
        url: without a path.
    """

    url = ""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str],
        *,
        wrapper: Sequence[str] = (),
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
        ready: bool = True,
        start_s: float = START_S,
        end_s: float = END_S,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._up = _READY if ready else _LISTENING
        self._start_s = start_s
        name = str(program or installed("krea2-serve"))
        command = [*wrapper, name, "--port", "0", *flags]
        if not any(flag.split("=")[0] == "--storage" for flag in flags):
            command += ["--storage", str(folder / "images")]
        super().__init__(
            command,
            folder / "krea2-serve.log",
            folder=folder,
            # Nobody waits for a model hub, which nothing here needs.
            environment={"HF_HUB_OFFLINE": "1", **(environment or {})},
            end_s=end_s,
        )

    def wait_until_up(self) -> None:
        self.url = self.wait_for_line(self._up, self._start_s)[1]
