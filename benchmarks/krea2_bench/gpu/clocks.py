"""Clocks and power of the GPU, sampled all the time by the driver's own tool."""

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

INTERVAL_MS = 100
_QUERY = "clocks.sm,clocks.mem,power.draw"
_KEPT = 6000
"""Samples: ten minutes."""


@dataclass(frozen=True)
class Clocks:
    """Medians over some time.

    Attributes:
        sm_mhz, memory_mhz: of the processors and of the memory.
        power_w: that it takes.
    """

    sm_mhz: float
    memory_mhz: float
    power_w: float


class ClockSampler:
    """Reads ``nvidia-smi`` as it goes; without it nothing is known.

    Args:
        tool: the command, or None where there is none.
        clock: seconds, those of the rows' spans.
    """

    def __init__(
        self, tool: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, Clocks]] = deque(maxlen=_KEPT)
        self._rest = b""
        self._process: subprocess.Popen[bytes] | None = None
        if tool is None:
            return
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        with suppress(OSError):
            self._process = subprocess.Popen(
                [*command, f"-lms={INTERVAL_MS}", f"--id={device}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def files(self) -> list[int]:
        """Descriptors that can be read when there are samples."""
        if self._process is None or self._process.stdout is None:
            return []
        return [self._process.stdout.fileno()]

    def read(self) -> None:
        """Take the samples that are there."""
        for file in self.files:
            with suppress(BlockingIOError):
                while some := os.read(file, 2**16):
                    self._take(some)
                self.close()  # it has ended

    def between(self, span: tuple[float, float] | None) -> Clocks | None:
        """The clocks of some time; the last before its end where none fell into it."""
        self.read()
        start, end = span or (self._clock(), self._clock())
        inside = [clocks for at, clocks in self._samples if start <= at <= end]
        if not inside:
            before = [clocks for at, clocks in self._samples if at <= end]
            inside = before[-1:]
        return _medians(inside) if inside else None

    def close(self) -> None:
        """End the tool."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def _take(self, some: bytes) -> None:
        *lines, self._rest = (self._rest + some).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # "[N/A]", or something else in place of a number
                sm, memory, power = (float(value) for value in line.split(b","))
                self._samples.append((self._clock(), Clocks(sm, memory, power)))


def nvidia_smi() -> str | None:
    """The driver's tool, where there is one."""
    return shutil.which("nvidia-smi")


def _medians(samples: Iterable[Clocks]) -> Clocks:
    samples = list(samples)
    return Clocks(
        median(s.sm_mhz for s in samples),
        median(s.memory_mhz for s in samples),
        median(s.power_w for s in samples),
    )
