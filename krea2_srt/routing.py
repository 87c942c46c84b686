"""Routing among replicas, by outstanding work: what each has still to do, and where a request goes.

Taking them in turn lets small requests queue behind a big one while another replica idles.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from krea2_srt.engine import policy
from krea2_srt.engine.cost import roofline
from krea2_srt.request import AdapterChoice, ImageRequest

_COST = roofline()


@dataclass(frozen=True, eq=False)
class WorkEntry:
    """An outstanding request's entry among those of a replica.

    Attributes:
        key: in the engine's order; smaller runs first.
        work: estimated milliseconds.
    """

    key: float
    work: int


class OutstandingWork:
    """The requests that were sent to a replica and have not ended.

    Attributes:
        outstanding: estimated milliseconds of them. Whole, so that what is added and taken away
            leaves exactly 0.
    """

    def __init__(self) -> None:
        self.outstanding = 0
        self._entries: set[WorkEntry] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, work: int) -> WorkEntry:
        """A request of ``work`` ms goes there."""
        entry = WorkEntry(order_key(work), work)
        self.outstanding += work
        self._entries.add(entry)
        return entry

    def remove(self, entry: WorkEntry) -> None:
        """It has ended; the second time is no error."""
        if entry in self._entries:
            self._entries.discard(entry)
            self.outstanding -= entry.work

    def added_wait(self, work: int) -> int:
        """Milliseconds that a request of ``work`` ms would wait here, and make others wait.

        What the engine's default policy would do before it, and its own work for each request that
        it would come before. Each request where this is least keeps the sum of all latencies low:
        a small one may pass a large one, but not without counting that.
        """
        key = order_key(work)
        return sum(entry.work if entry.key <= key else work for entry in self._entries)

    def ahead(self, entry: WorkEntry) -> int:
        """How many requests the engine's default policy would finish before this one."""
        return sum(other.key < entry.key for other in self._entries)


def order_key(work: int) -> float:
    """As `krea2_srt.engine.policy.srpt` orders requests that have just arrived."""
    return time.monotonic() + policy.STRETCH * work / 1e3


def image_ms(request: ImageRequest, images: int) -> int:
    """Work of that many images of a request, in milliseconds on some GPU: only ratios count."""
    image = request.steps * _COST.step(request.estimated_tokens)
    return 1 + int(images * (image + _COST.decode(request.width * request.height)))


_UPLOAD_BYTES_PER_MS = 25e6
_READ_BYTES_PER_MS = 1e6
_TYPICAL_BYTES = 235_000_000
"""An adapter's of which a replica has said nothing: rank 32, all matrices."""


def adapters_ms(choices: Iterable[AdapterChoice], there: Mapping[str, tuple[str, int]]) -> int:
    """Milliseconds until a replica has adapters on its device, as `image_ms` counts them.

    Args:
        choices: that a request asks for.
        there: where the replica has adapters, and their bytes, by name.
    """
    total = 0.0
    for choice in choices:
        where, nbytes = there.get(choice.name, ("disk", _TYPICAL_BYTES))
        if where != "device":
            total += nbytes / _UPLOAD_BYTES_PER_MS
        if where == "disk":
            total += nbytes / _READ_BYTES_PER_MS
    return int(total)


def _nothing(index: int) -> int:
    return 0


class ReplicaExited(RuntimeError):
    """No replica is left that a request could go to."""


@dataclass(frozen=True)
class Assignment:
    """A request's replica, and its entry there.

    Attributes:
        index: of the replica.
    """

    index: int
    entry: WorkEntry


class Replicas:
    """The replicas of one client: which live, and what each has still to do.

    Attributes:
        loads: the outstanding work of each replica.
    """

    def __init__(self, count: int) -> None:
        self.loads = [OutstandingWork() for _ in range(count)]
        self._dead: set[int] = set()
        self._turn = 0

    def __len__(self) -> int:
        return len(self.loads)

    @property
    def outstanding(self) -> list[int]:
        """Estimated milliseconds on each replica."""
        return [load.outstanding for load in self.loads]

    @property
    def live(self) -> list[int]:
        return [index for index in range(len(self)) if index not in self._dead]

    def choose(self, work: int = 0, more_ms: Callable[[int], int] = _nothing) -> int:
        """The live replica where a request of ``work`` ms adds least to what all wait.

        See `OutstandingWork.added_wait`. Then counts all outstanding work; equal replicas take
        turns.

        Args:
            work: estimated milliseconds.
            more_ms: those that it waits for on one of them alone, by index: for its adapters.

        Raises:
            ReplicaExited: none is left.
        """
        if not self.live:
            raise ReplicaExited("all replicas have exited")

        def wait(index: int) -> tuple[int, int, int]:
            load = self.loads[index]
            turn = (index - self._turn) % len(self)
            return load.added_wait(work) + more_ms(index), load.outstanding, turn

        index = min(self.live, key=wait)
        self._turn = index + 1
        return index

    @contextmanager
    def place(self, work: int, more_ms: Callable[[int], int] = _nothing) -> Iterator[Assignment]:
        """Count a request as outstanding on the best replica for as long as it lasts.

        Args:
            work, more_ms: see `choose`.

        Raises:
            ReplicaExited: none is left.
        """
        index = self.choose(work, more_ms)
        entry = self.loads[index].add(work)
        try:
            yield Assignment(index, entry)
        finally:
            self.loads[index].remove(entry)

    def ahead(self, assignment: Assignment) -> int:
        """How many requests the engine's default policy would finish before this one."""
        return self.loads[assignment.index].ahead(assignment.entry)

    def mark_live(self, index: int) -> None:
        """Send requests to this replica again."""
        self._dead.discard(index)

    def mark_dead(self, index: int) -> None:
        """Send requests to it no more; what is on it fails with its connection."""
        self._dead.add(index)
