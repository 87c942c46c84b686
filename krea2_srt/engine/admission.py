"""Admission: what the engine takes in, bounded in seconds of work."""

from krea2_srt.engine.lifecycle import Request
from krea2_srt.errors import DrainingError, QueueFullError


class Admission:
    """Decides at once whether a request is taken.

    Args:
        max_queue_s: estimated seconds of work in the engine. A request that alone exceeds it is
            taken by an empty engine.
    """

    def __init__(self, max_queue_s: float) -> None:
        self.max_queue_s = max_queue_s
        self.draining = False

    def check(self, request: Request, outstanding_ms: float) -> None:
        """Let a request in.

        Args:
            request: with its `remaining_ms`.
            outstanding_ms: estimated work of all requests in the engine.

        Raises:
            DrainingError: nothing is taken any more.
            QueueFullError: with the seconds after which it would be taken, if nothing else came.
        """
        if self.draining:
            raise DrainingError("the engine is shutting down and takes no more requests")
        excess_s = (outstanding_ms + request.remaining_ms) / 1e3 - self.max_queue_s
        if outstanding_ms > 0 and excess_s > 0:
            # An empty engine takes anything, so waiting for that is always enough.
            retry_after_s = min(excess_s, outstanding_ms / 1e3)
            raise QueueFullError(
                f"{outstanding_ms / 1e3:.1f} s of work are queued, the limit is "
                f"{self.max_queue_s:g} s; retry after {retry_after_s:.1f} s",
                retry_after_s,
            )
