"""Eight tenants with an adapter each, in turn, at a fixed rate: with each request, or by switching.

SGLang's adapters are the whole server's, so a tenant's request is two calls, and nobody else's may
come between them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from krea2_bench.adapters.http import Client, psnr

TENANTS = 8


def sequential_s(client: Client, files: Sequence[Path], rounds: int) -> list[float]:
    """Seconds of each request where they come one after another, each with a switch before it."""
    found = []
    for number in range(rounds * len(files)):
        start = time.perf_counter()
        _switched(client, files[number % len(files)], number)
        found.append(time.perf_counter() - start)
    return found


def latencies(generate: Callable[[int], None], number: int, interval_s: float) -> list[float]:
    """Seconds from the time at which each request was due until its picture was there.

    Args:
        generate: one request, by its number; called in threads.
        number: of requests.
        interval_s: between two of them.
    """
    start = time.perf_counter() + 0.5

    def one(index: int) -> float:
        due = start + index * interval_s
        time.sleep(max(0.0, due - time.perf_counter()))
        generate(index)
        return time.perf_counter() - due

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


def by_request(client: Client, names: Sequence[str]) -> Callable[[int], None]:
    """Ours: the adapter is a field of the request."""

    def generate(index: int) -> None:
        client.picture(names[index % len(names)], index)

    return generate


def by_switching(client: Client, files: Sequence[Path]) -> Callable[[int], None]:
    """SGLang's: a call that switches, and one that generates, first come, first served."""
    turns = _Turns()

    def generate(index: int) -> None:
        with turns.of(index):
            _switched(client, files[index % len(files)], index)

    return generate


def likeness(ours: Client, theirs: Client, files: Sequence[Path]) -> dict[str, Any]:
    """How near the two servers' pictures are, in dB: with the same adapter, and with others."""
    theirs.set_adapter(files[0].stem, str(files[0]))
    with_adapter = [theirs.picture(seed=seed) for seed in range(2)]
    theirs.set_adapter(files[1].stem, str(files[1]))
    other = theirs.picture(seed=0)
    return {
        "same adapter": [
            round(psnr(ours.picture(files[0].stem, seed), with_adapter[seed]), 1)
            for seed in range(2)
        ],
        "another adapter": round(psnr(ours.picture(files[0].stem, 0), other), 1),
        "no adapter": round(psnr(ours.picture(None, 0), with_adapter[0]), 1),
    }


def _switched(client: Client, file: Path, seed: int) -> None:
    client.set_adapter(file.stem, str(file))
    client.picture(seed=seed)


class _Turns:
    """First come, first served: a lock alone lets whoever is quickest in."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()

    def of(self, index: int) -> "_Turn":
        return _Turn(self, index)

    def begin(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._next == index)

    def end(self) -> None:
        with self._changed:
            self._next += 1
            self._changed.notify_all()


class _Turn:
    def __init__(self, turns: _Turns, index: int) -> None:
        self._turns = turns
        self._index = index

    def __enter__(self) -> None:
        self._turns.begin(self._index)

    def __exit__(self, *_: object) -> None:
        self._turns.end()
