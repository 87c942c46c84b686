"""When requests have to be done."""

import heapq
from itertools import count

from krea2_srt.engine.lifecycle import Request


class Deadlines:
    """Requests by their deadlines; those without one are not here."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request, num_live: int) -> None:
        """Watch a request.

        Args:
            request: any; watched if it has a deadline.
            num_live: requests that have not ended.
        """
        if request.deadline is None:
            return
        heapq.heappush(self._heap, (request.deadline, next(self._numbers), request))
        if len(self._heap) > 2 * num_live + 64:
            # Ended requests stay until they come up; with far deadlines that may take a day.
            self._heap = [entry for entry in self._heap if not entry[2].ended]
            heapq.heapify(self._heap)

    def take_overdue(self, now: float) -> list[Request]:
        """Requests whose deadline has passed and that have not ended; each is told once."""
        found = []
        while self._heap and (self._heap[0][2].ended or self._heap[0][0] <= now):
            request = heapq.heappop(self._heap)[2]
            if not request.ended:
                found.append(request)
        return found
