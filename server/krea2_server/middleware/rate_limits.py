"""Limits of each key: requests a minute, and requests at a time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from krea2_server.errors import ApiError
from krea2_server.keys import Client

BURST_S = 10.0
"""A key that has been silent may send at once what it may send in this time."""


class RateLimits:
    """What each client has sent and has under way.

    A token bucket each: it fills at the client's rate, and holds `BURST_S` of it, or one request.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._concurrent: Counter[str] = Counter()

    @contextmanager
    def request(self, client: Client) -> Iterator[None]:
        """Count a request for as long as it lasts.

        Raises:
            ApiError: 429, the client is over a limit.
        """
        if client.max_concurrent and self._concurrent[client.name] >= client.max_concurrent:
            raise ApiError(
                429,
                f"{client.max_concurrent} requests of this key are under way, which is its limit",
                "concurrency_limit",
                retry_after_s=1.0,
                retry=True,
            )
        self._take(client)
        self._concurrent[client.name] += 1
        try:
            yield
        finally:
            self._concurrent[client.name] -= 1

    def _take(self, client: Client) -> None:
        if not client.requests_per_minute:
            return
        each_s = 60.0 / client.requests_per_minute
        now = self._clock()
        # The bucket by the time at which it will be full: nothing needs to fill it.
        full_at = max(self._full_at.get(client.name, now), now) + each_s
        wait_s = full_at - now - max(BURST_S, each_s)
        if wait_s > 0:
            raise ApiError(
                429,
                f"more than {client.requests_per_minute:g} requests a minute with this key",
                "rate_limit_exceeded",
                retry_after_s=wait_s,
                retry=True,
            )
        self._full_at[client.name] = full_at
