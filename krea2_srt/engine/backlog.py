"""What a replica has still to do, as whoever sends it requests can know."""

import time
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
