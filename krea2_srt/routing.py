"""Routing among replicas, by outstanding work: what each has still to do, and where a request goes.

Taking them in turn lets small requests queue behind a big one while another replica idles.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from krea2_srt.engine.cost import roofline
from krea2_srt.engine.policy import STRETCH
from krea2_srt.request import ImageRequest

_COST = roofline()
NONE_LEFT = "all replicas have exited; restart the server"


@dataclass(frozen=True, eq=False)
class Place:
    """An outstanding request's place in a backlog.

    Attributes:
        key: in the engine's order; smaller runs first.
        work: estimated milliseconds.
    """

    key: float
    work: int


class Backlog:
    """The requests that were sent to a replica and have not ended.

    Attributes:
        outstanding: estimated milliseconds of them. Whole, so that what is added and taken away
            leaves exactly 0.
    """

    def __init__(self) -> None:
        self.outstanding = 0
        self._places: set[Place] = set()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, work: int) -> Place:
        """A request of ``work`` ms goes there."""
        place = Place(order_key(work), work)
        self.outstanding += work
        self._places.add(place)
        return place

    def remove(self, place: Place) -> None:
        """It has ended; the second time is no error."""
        if place in self._places:
            self._places.discard(place)
            self.outstanding -= place.work

    def added_wait(self, work: int) -> int:
        """Milliseconds that a request of ``work`` ms would wait here, and make others wait.

        What the engine's default policy would do before it, and its own work for each request that
        it would come before. Each request where this is least keeps the sum of all latencies low:
        a small one may pass a large one, but not without counting that.
        """
        key = order_key(work)
        return sum(place.work if place.key <= key else work for place in self._places)

    def ahead(self, place: Place) -> int:
        """How many requests the engine's default policy would finish before this one."""
        return sum(other.key < place.key for other in self._places)


def order_key(work: int) -> float:
    """As `krea2_srt.engine.policy.srpt` orders requests that have just arrived."""
    return time.monotonic() + STRETCH * work / 1e3


def image_ms(request: ImageRequest, images: int) -> int:
    """Work of that many images of a request, in milliseconds on some GPU: only ratios count."""
    image = request.steps * _COST.step(request.estimated_tokens)
    return 1 + int(images * (image + _COST.decode(request.width * request.height)))


class ReplicaExited(RuntimeError):
    """The replica that a request was on, or had to go to, is no longer there."""


@dataclass(frozen=True)
class Assignment:
    """A request's replica, and its place there.

    Attributes:
        index: of the replica.
    """

    index: int
    place: Place


class Replicas:
    """The replicas of one client: which live, and what each has still to do.

    Attributes:
        backlogs: of each replica.
    """

    def __init__(self, count: int) -> None:
        self.backlogs = [Backlog() for _ in range(count)]
        self._forwards: list[set[asyncio.Task[Any]]] = [set() for _ in range(count)]
        self._dead: set[int] = set()
        self._turn = 0

    def __len__(self) -> int:
        return len(self.backlogs)

    @property
    def outstanding(self) -> list[int]:
        """Estimated milliseconds on each replica."""
        return [backlog.outstanding for backlog in self.backlogs]

    @property
    def live(self) -> list[int]:
        return [index for index in range(len(self)) if index not in self._dead]

    def choose(self, work: int = 0) -> int:
        """The live replica where a request of ``work`` ms adds least to what all wait.

        See `Backlog.added_wait`. Then counts all outstanding work; equal replicas take turns.

        Raises:
            ReplicaExited: none is left.
        """
        if not self.live:
            raise ReplicaExited(NONE_LEFT)

        def wait(index: int) -> tuple[int, int, int]:
            backlog = self.backlogs[index]
            turn = (index - self._turn) % len(self)
            return backlog.added_wait(work), backlog.outstanding, turn

        index = min(self.live, key=wait)
        self._turn = index + 1
        return index

    @contextmanager
    def place(self, work: int, index: int | None = None) -> Iterator[Assignment]:
        """Count a request as outstanding on a replica for as long as it lasts.

        Args:
            work: estimated milliseconds.
            index: the replica that must do it; by default the best one.

        Raises:
            ReplicaExited: the replica is dead.
        """
        index = self.choose(work) if index is None else index
        if index in self._dead:
            raise ReplicaExited(_exited(index))
        place = self.backlogs[index].add(work)
        try:
            yield Assignment(index, place)
        finally:
            self.backlogs[index].remove(place)

    def ahead(self, assignment: Assignment) -> int:
        """How many requests the engine's default policy would finish before this one."""
        return self.backlogs[assignment.index].ahead(assignment.place)

    @contextmanager
    def forward(self, work: int, index: int | None = None) -> Iterator[int]:
        """As `place`, for a request that the current task waits for.

        Raises:
            ReplicaExited: the replica is dead, or dies meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        with self.place(work, index) as assignment:
            index = assignment.index
            self._forwards[index].add(task)
            try:
                yield index
            except asyncio.CancelledError:
                # Dead now, alive above: mark_dead has cancelled us. If others have too, theirs
                # wins.
                if index in self._dead and task.uncancel() <= cancels:
                    raise ReplicaExited(_exited(index)) from None
                raise
            finally:
                self._forwards[index].discard(task)

    def mark_live(self, index: int) -> None:
        """Send requests to this replica again."""
        self._dead.discard(index)

    def mark_dead(self, index: int) -> None:
        """Fail what is on this replica at once, and send it nothing more."""
        if index not in self._dead:
            self._dead.add(index)
            for task in self._forwards[index]:
                task.cancel()


def _exited(index: int) -> str:
    return f"replica {index} has exited; send the request again"
