"""What a start of an engine was spent on, for one line of its log."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from krea2_srt.read_ahead import ReadAheadReport


def process_age_s() -> float:
    """Seconds since this process began, its interpreter's own start included."""
    # The name in the second field may hold anything; the process's start is the 22nd field.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s


@dataclass(frozen=True)
class StartUp:
    """The stages of a start, in seconds since the process began.

    Attributes:
        imported_s: when loading began.
        loaded_s: when the weights were in their places.
        ahead: what was read meanwhile.
    """

    imported_s: float
    loaded_s: float
    ahead: ReadAheadReport

    def text(self, ready_s: float) -> str:
        """All of it in words.

        Args:
            ready_s: when the engine was ready.
        """
        ahead = self.ahead
        gb = ahead.bytes_read / 1e9
        rate = f" ({gb / ahead.seconds:.2f} GB/s)" if ahead.seconds else ""
        return (
            f"ready {ready_s:.1f} s after its process began: imports {self.imported_s:.1f} s, "
            f"loading {self.loaded_s - self.imported_s:.1f} s ({ahead.waited_s:.1f} s of it "
            f"waiting for files), warm-up {ready_s - self.loaded_s:.1f} s; "
            f"beside them {gb:.2f} GB were read in {ahead.seconds:.1f} s{rate}"
        )
