"""A line that says how it goes: what is done, how fast, and the tail of the latencies."""

import sys
import time
from collections import deque
from typing import Self

from tqdm import tqdm

from krea2_bench.load.outcome import DONE, FAILED, REJECTED, Outcome
from krea2_bench.percentiles import percentile

_WINDOW_S = 15.0
_WINDOW = 200


class Progress:
    """A progress bar on stderr, where that is a terminal; a context.

    Args:
        what: is being done.
        total: requests.
    """

    def __init__(self, what: str, total: int) -> None:
        self._bar = tqdm(total=total, desc=what, unit="req", disable=None, dynamic_ncols=True)
        self._what = what
        self._count = 0
        self._start = time.perf_counter()
        self._ended: deque[float] = deque()
        self._latencies: deque[float] = deque(maxlen=_WINDOW)
        self._failed = 0
        self._rejected = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._bar.disable:  # no terminal: one line in a log says as much
            seconds = time.perf_counter() - self._start
            text = self._text(time.perf_counter(), 0)
            print(f"{self._what}: {self._count} in {seconds:.1f} s, {text}", file=sys.stderr)

    def show(self, outcome: Outcome, in_flight: int) -> None:
        """One more has ended."""
        now = time.perf_counter()
        self._failed += outcome.outcome == FAILED
        self._rejected += outcome.outcome == REJECTED
        if outcome.outcome == DONE:
            self._ended.append(now)
            self._latencies.append(outcome.latency_s)
        while self._ended and self._ended[0] < now - _WINDOW_S:
            self._ended.popleft()
        if not self._bar.disable:
            self._bar.set_postfix_str(self._text(now, in_flight), refresh=False)
        self._count += 1
        self._bar.update()

    def _text(self, now: float, in_flight: int) -> str:
        span_s = now - self._ended[0] if len(self._ended) > 1 else 0.0
        parts = [f"{len(self._ended) / span_s:.2f}/s"] if span_s else []
        if self._latencies:
            parts.append(f"p95 {percentile(self._latencies, 95):.2f} s")
        if in_flight:
            parts.append(f"{in_flight} under way")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._rejected:
            parts.append(f"{self._rejected} refused")
        return ", ".join(parts)
