"""Threads that read files, and that nobody waits for at the end: a disk may not answer."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Readers:
    """A pool of daemon threads, started as they are needed.

    `concurrent.futures` has one, and waits for it when the process ends.

    Args:
        count: at most.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._started = 0

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have something done; what it raises is the future's."""
        future: Future[T] = Future()
        self._jobs.put((future, work))
        if self._started < self._count:
            self._started += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def close(self) -> None:
        """End the threads, once each has done what it is at."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del job, future, work  # or they would live until the next one comes
