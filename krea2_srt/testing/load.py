"""Clients that ask one request after the other, and what became of each."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import httpx

DONE = "done"
NO_ANSWER = "no answer"
"""Refused by the machine, or the connection broke: the client knows, and asks again."""

UNAVAILABLE = "503 engine_unavailable"
"""No engine is there, or it has died with the request."""

VANISHED = "vanished"
"""Neither image nor error within the client's patience. This must not be."""

PHASES = ("before", "during", "after")


@dataclass(frozen=True)
class Ended:
    """A request that has ended.

    Attributes:
        phase: in which it was sent.
        outcome: `DONE`, `NO_ANSWER`, `VANISHED`, or the status and code of an error.
        sent_at, ended_at: by the monotonic clock, in seconds.
    """

    phase: str
    outcome: str
    sent_at: float
    ended_at: float


def ended_by_server(url: str) -> dict[str, int]:
    """Requests by how they ended, as the server itself counts them."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(r'^krea2_requests_total\{outcome="(\w+)"\} ([\d.e+]+)$', text, re.M)
    return {outcome: int(float(count)) for outcome, count in found if float(count)}


class Load:
    """Closed-loop clients.

    Args:
        url: of the server.
        clients: how many.
        sizes: of the images, in turn.
        fields: of each request, beside prompt, size and seed.
        patience_s: for an answer.
        pause_s: of a client after an error.

    Attributes:
        phase: of the drill, as of now.
        think_s: of a client after each answer, as of now. What starts beside clients that do not
            pause is starved where there are few cores.
    """

    def __init__(
        self,
        url: str,
        clients: int = 4,
        sizes: Sequence[str] = ("64x64", "128x128", "256x256"),
        fields: dict[str, object] | None = None,
        patience_s: float = 600,
        pause_s: float = 0.2,
    ) -> None:
        self.phase = PHASES[0]
        self.think_s = 0.0
        self._url = f"{url}/v1/images/generations"
        self._clients = clients
        self._sizes = sizes
        self._fields = fields or {}
        self._patience_s = patience_s
        self._pause_s = pause_s
        self._numbers = count()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._ended: list[Ended] = []

    @property
    def ended(self) -> list[Ended]:
        """All requests that have ended so far."""
        with self._lock:
            return list(self._ended)

    def counts(self, phase: str | None = None) -> Counter[str]:
        """Requests by how they ended, of a phase or of all."""
        return Counter(it.outcome for it in self.ended if phase in (None, it.phase))

    def wait_for(self, number: int, outcome: str = DONE, timeout_s: float = 600) -> None:
        """Until so many more requests of this phase have ended in a way.

        Raises:
            TimeoutError: they have not.
        """
        wanted = self.counts(self.phase)[outcome] + number
        deadline = time.monotonic() + timeout_s
        while self.counts(self.phase)[outcome] < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{number} requests that end with {outcome!r} in {timeout_s} s")
            time.sleep(0.05)

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
                phase, sent_at = self.phase, time.monotonic()
                body = {"prompt": "x", "size": size, "seed": number, **self._fields}
                outcome = self._generate(client, body)
                with self._lock:
                    self._ended.append(Ended(phase, outcome, sent_at, time.monotonic()))
                self._stopped.wait(self.think_s if outcome == DONE else self._pause_s)

    def _generate(self, client: httpx.Client, body: dict[str, object]) -> str:
        try:
            response = client.post(self._url, json=body)
        except httpx.TimeoutException:
            return VANISHED
        except httpx.HTTPError:
            return NO_ANSWER
        if response.status_code != httpx.codes.OK:
            return f"{response.status_code} {_code(response)}"
        image = response.json()["data"][0]
        return DONE if image.get("b64_json") or image.get("url") else VANISHED


def _code(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return response.text[:100]
