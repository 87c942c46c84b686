"""Clients that ask one request after the other, and what became of each."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import httpx

SIZES = ("64x64", "96x64", "128x128", "256x256")


class Load:
    """Closed-loop clients.

    Args:
        url: of the server.
        clients: how many.
        sizes: of the images, in turn.
        patience_s: for an answer.
    """

    def __init__(
        self, url: str, clients: int, sizes: tuple[str, ...] = SIZES, patience_s: float = 120
    ) -> None:
        self._url = f"{url}/v1/images/generations"
        self._clients = clients
        self._sizes = sizes
        self._patience_s = patience_s
        self._numbers = count()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: list[tuple[float, str]] = []
        """When each ended, by the monotonic clock, and how: ``200``, or what went wrong."""

    @property
    def counts(self) -> Counter[str]:
        """Requests by how they ended, so far."""
        with self._lock:
            return Counter(outcome for _, outcome in self.outcomes)

    def done_between(self, start: float, end: float) -> int:
        """Images of that time."""
        with self._lock:
            return sum(start <= at < end and how == "200" for at, how in self.outcomes)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Until the end of the context, and until the last of them has its answer."""
        threads = [threading.Thread(target=self._client) for _ in range(self._clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()

    def _client(self) -> None:
        with httpx.Client(timeout=self._patience_s) as client:
            while not self._stopped.is_set():
                number = next(self._numbers)
                size = self._sizes[number % len(self._sizes)]
                outcome = self._draw(client, {"prompt": "x", "size": size, "seed": number})
                with self._lock:
                    self.outcomes.append((time.monotonic(), outcome))

    def _draw(self, client: httpx.Client, body: dict[str, object]) -> str:
        try:
            response = client.post(self._url, json=body)
        except httpx.HTTPError as error:
            return type(error).__name__
        if response.status_code != 200:
            return f"{response.status_code} {response.text[:200]}"
        images = response.json()["data"]
        return "200" if images and images[0]["b64_json"] else "no image"
