"""Routing among replicas, by outstanding work: what each has still to do, and where a request goes.

Taking them in turn lets small requests queue behind a big one while another replica idles.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from krea2_srt.engine.cost import roofline
from krea2_srt.engine.policy import STRETCH
from krea2_srt.request import ImageRequest

_COST = roofline()


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
    """No replica is left that a request could go to."""


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
            raise ReplicaExited("all replicas have exited")

        def wait(index: int) -> tuple[int, int, int]:
            backlog = self.backlogs[index]
            turn = (index - self._turn) % len(self)
            return backlog.added_wait(work), backlog.outstanding, turn

        index = min(self.live, key=wait)
        self._turn = index + 1
        return index

    @contextmanager
    def place(self, work: int) -> Iterator[Assignment]:
        """Count a request as outstanding on the best replica for as long as it lasts.

        Args:
            work: estimated milliseconds.

        Raises:
            ReplicaExited: none is left.
        """
        index = self.choose(work)
        place = self.backlogs[index].add(work)
        try:
            yield Assignment(index, place)
        finally:
            self.backlogs[index].remove(place)

    def ahead(self, assignment: Assignment) -> int:
        """How many requests the engine's default policy would finish before this one."""
        return self.backlogs[assignment.index].ahead(assignment.place)

    def mark_live(self, index: int) -> None:
        """Send requests to this replica again."""
        self._dead.discard(index)

    def mark_dead(self, index: int) -> None:
        """Send requests to it no more; what is on it fails with its connection."""
        self._dead.add(index)
