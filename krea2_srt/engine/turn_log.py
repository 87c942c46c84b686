"""A line of JSON for every unit of work: what ran when, and for whom.

Off unless ``turn_log`` names a file. The first line says what machine and model it is; times are
seconds since the epoch, so that those of clients can be laid beside them. `krea2-bench report`
draws it.
"""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from krea2_srt.engine.lifecycle import Sequence
from krea2_srt.engine.work import Decode, Encode, PackStep, Work
from krea2_srt.errors import ConfigError

logger = logging.getLogger(__name__)

VERSION = 1


class TurnLog:
    """Appends to a file.

    Args:
        path: of the file; what it held is kept.
        header: what its first line says beside the version.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        try:
            # By the line: a process that is killed leaves whole lines.
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"turn_log: {path}: {error.strerror}") from None
        self._write({"version": VERSION, **header})

    def entry(self, work: Work) -> dict[str, Any]:
        """What to say of a unit of work that is about to run."""
        at = {"at": round(time.time(), 6)}
        match work:
            case Encode(requests):
                ids = [request.id for request in requests]
                return at | {"work": "encode", "requests": ids}
            case PackStep():
                blocks = work.next_blocks
                return at | {
                    "work": "step",
                    "blocks": [blocks.start, blocks.stop, work.total_blocks],
                    "steps": work.steps,
                    "sequences": [_place(sequence) for sequence in work.sequences],
                }
            case Decode(sequence):
                return at | {"work": "decode", "sequences": [_place(sequence)]}

    def ran(self, entry: Mapping[str, Any], seconds: float) -> None:
        """It has run."""
        self._write({**entry, "ms": round(seconds * 1e3, 3)})

    def close(self) -> None:
        with suppress(OSError):  # what is left may not fit either
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            # A full disk must not stop the engine.
            logger.warning("krea2-srt: turn_log: %s; no more is written", error.strerror)
            self.close()


def _place(sequence: Sequence) -> list[Any]:
    """Request, image, steps done before, and the tokens of its branches."""
    return [sequence.request.id, sequence.index, sequence.step, list(sequence.tokens)]
