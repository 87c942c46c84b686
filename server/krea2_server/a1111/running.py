"""What is under way of each key's requests to txt2img: how far it is, and its end."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from krea2_server.errors import ApiError
from krea2_srt.messages import ProgressUpdate
from krea2_srt.request import ImageRequest


class Running:
    """A request under way.

    Args:
        image: what is generated.
        task: the one that answers it.
        clock: seconds; only differences count.
    """

    def __init__(
        self, image: ImageRequest, task: "asyncio.Task[Any]", clock: Callable[[], float]
    ) -> None:
        self.images = image.num_images
        self.steps = image.steps
        self.interrupted = False
        self.since = time.strftime("%Y%m%d%H%M%S")
        self._task = task
        self._clock = clock
        self._done = [0] * image.num_images
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    @property
    def done(self) -> int:
        """Steps of all its images."""
        return sum(self._done)

    @property
    def total(self) -> int:
        return self.images * self.steps

    @property
    def images_done(self) -> int:
        return sum(done == self.steps for done in self._done)

    @property
    def step(self) -> int:
        """Steps of the image that is behind."""
        return min(self._done)

    @property
    def remaining_s(self) -> float:
        """Seconds that its steps still take, at their pace so far; 0 where none is known."""
        if self._first is None or self._last is None:
            return 0.0
        seconds, steps = (last - first for first, last in zip(self._first, self._last, strict=True))
        return (self.total - self.done) * seconds / steps if steps else 0.0

    def tell(self, update: ProgressUpdate) -> None:
        """A step is done."""
        self._done[update.sequence] = update.step
        self._last = (self._clock(), self.done)
        self._first = self._first or self._last

    def interrupt(self) -> None:
        """End it, as a client does that hangs up."""
        if not self.interrupted:
            self.interrupted = True
            self._task.cancel("interrupted")


class RunningRequests:
    """All requests under way, by the name of the client whose they are.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: defaultdict[str, list[Running]] = defaultdict(list)

    @contextmanager
    def request(self, client: str, image: ImageRequest) -> Iterator[Running]:
        """A request, for as long as it lasts.

        Raises:
            ApiError: 499, it was interrupted.
        """
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        running = Running(image, task, self._clock)
        self._running[client].append(running)
        try:
            yield running
        except asyncio.CancelledError:
            # Of two cancels, ours and one because the client has gone, the other wins.
            if running.interrupted and task.uncancel() <= cancels:
                raise ApiError(499, "the request was interrupted", "cancelled") from None
            raise
        finally:
            self._running[client].remove(running)
            if not self._running[client]:
                del self._running[client]

    def interrupt(self, client: str) -> None:
        """End all requests of a client."""
        for running in self._running.get(client, ()):
            running.interrupt()

    def progress(self, client: str) -> dict[str, Any]:
        """How far the requests of a client are, in A1111's words: ``progress`` from 0 to 1,
        ``eta_relative`` in seconds.
        """
        running = self._running.get(client, [])
        total = sum(one.total for one in running)
        return {
            "progress": sum(one.done for one in running) / total if total else 0.0,
            "eta_relative": max((one.remaining_s for one in running), default=0.0),
            "state": {
                "skipped": False,
                "interrupted": any(one.interrupted for one in running),
                "stopping_generation": False,
                "job": "txt2img" if running else "",
                "job_count": sum(one.images for one in running),
                "job_timestamp": running[0].since if running else "0",
                "job_no": sum(one.images_done for one in running),
                "sampling_step": running[0].step if running else 0,
                "sampling_steps": running[0].steps if running else 0,
            },
            # A picture on its way is work that only streams ask for.
            "current_image": None,
            "textinfo": None,
        }
