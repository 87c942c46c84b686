"""An engine's process beside a slow disk: ``python -m krea2_bench.cold_start.worker RATE READING``.

RATE is in MB/s, 0 for the disk as it is; READING is of `READINGS`. What follows is for
`krea2_srt.sglang.worker`.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from krea2_srt import read_ahead
from krea2_srt.read_ahead import ReadAhead, read_to_page_cache
from krea2_srt.sglang import worker

READINGS = {
    "early": "as it is: from the start of the process",
    "late": "when loading begins",
    "none": "nothing is read ahead: the loader's page faults read",
}

_PIECES_PER_S = 50


class Throttled:
    """Reads as fast as a disk of this rate would.

    Args:
        rate: bytes per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    def __call__(self, descriptor: int, start: int, count: int) -> int:
        piece = min(count, int(self._rate / _PIECES_PER_S))
        done = read_to_page_cache(descriptor, start, piece)
        # What a late waking has lost is not made up for while nobody reads.
        self._free_at = max(self._free_at, time.monotonic() - 1 / _PIECES_PER_S)
        self._free_at += done / self._rate
        time.sleep(max(0.0, self._free_at - time.monotonic()))
        return done


def main(argv: list[str]) -> None:
    rate, reading, *options = argv
    read = Throttled(float(rate) * 1e6) if float(rate) else read_to_page_cache

    def made(files: Iterable[Path]) -> ReadAhead:
        return ReadAhead([] if reading == "none" else files, read=read)

    vars(read_ahead)["ReadAhead"] = made
    if reading != "early":
        vars(worker)["begin_for"] = lambda options: None
    worker.main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
