"""Telling clients how far their requests are."""

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sglang.multimodal_gen.runtime.managers.progress_reporter import get_progress_reporter
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from torch import Tensor

from krea2_srt.engine.events import Progress
from krea2_srt.engine.lifecycle import Request, Sequence, State
from krea2_srt.errors import first_line
from krea2_srt.messages import (
    ProgressUpdate,
    RequestEnded,
    Subscribe,
    preview_steps,
)
from krea2_srt.runner.executor import Preview, RunnerExecutor
from krea2_srt.sglang.replies import Item, engine_error

logger = init_logger(__name__)


def report_to_sglang(item: Item, request: Request) -> None:
    """Tell SGLang's own progress channel how far a request is, if it asks for that."""
    reporter = get_progress_reporter()
    if reporter is None:
        return
    for req in item.reqs:
        if req.report_progress and not req.is_warmup:
            reporter.step(
                request_ids=req.client_request_ids(),
                completed=sum(sequence.step for sequence in request.sequences),
                total=sum(sequence.image.steps for sequence in request.sequences),
            )


@dataclass
class _Subscriber:
    identity: bytes
    request_id: str
    previews: int
    tell_end: bool
    after_steps: dict[int, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Preview:
    """Latents to draw, and whom to send the picture with which update."""

    sequence: Sequence
    latents: Tensor | None
    updates: list[tuple[_Subscriber, ProgressUpdate]]


class Subscriptions:
    """Who wants to know of which request.

    Args:
        executor: draws the previews.
        send: a pickled message to a client.
    """

    def __init__(self, executor: RunnerExecutor, send: Callable[[bytes, bytes], None]) -> None:
        self._executor = executor
        self._send = send
        self._subscribers: dict[Request, list[_Subscriber]] = {}
        self._due: deque[_Preview] = deque()
        self._drawing: deque[tuple[_Preview, Preview]] = deque()

    def add(
        self, identity: bytes, wish: Subscribe, requests: list[Request], tell_end: bool = True
    ) -> None:
        """Subscribe a client to the requests of an id.

        Args:
            tell_end: with a `RequestEnded`, for who has no other way of knowing.
        """
        if not requests:
            self._send(identity, pickle.dumps(RequestEnded(wish.request_id, "unknown")))
        for request in requests:
            subscriber = _Subscriber(identity, wish.request_id, wish.previews, tell_end)
            for sequence in request.sequences:
                if wish.previews and not sequence.state.ended:
                    steps = preview_steps(sequence.image.steps, wish.previews)
                    subscriber.after_steps[sequence.index] = steps
                    self._executor.watch(sequence)
            self._subscribers.setdefault(request, []).append(subscriber)

    def step(self, progress: Progress) -> None:
        """A sequence has done a step."""
        sequence = progress.sequence
        due = []
        for subscriber in self._subscribers.get(sequence.request, ()):
            update = ProgressUpdate(
                subscriber.request_id, sequence.index, progress.step, progress.total
            )
            self._send(subscriber.identity, pickle.dumps(update))
            if progress.step in subscriber.after_steps.get(sequence.index, ()):
                due.append((subscriber, update))
        if due:
            self._due.append(_Preview(sequence, self._executor.predict(sequence), due))

    @property
    def drawing(self) -> bool:
        """Whether previews are under way that a next call of `draw` should look after."""
        return bool(self._drawing)

    def draw(self, max_ms: float) -> bool:
        """Draw previews, those first that have been due for longest; whether there was one. What
        is drawn beside the steps is sent by a later call.

        Args:
            max_ms: after which no further one is begun: nothing should wait for more.
        """
        until = time.monotonic() + max_ms / 1e3
        drawn = False
        while self._due and not (drawn and time.monotonic() >= until):
            preview = self._due.popleft()
            # Of a request that has ended, the picture itself is there.
            if preview.latents is not None and not preview.sequence.request.ended:
                with _no_preview_where_it_fails():
                    self._drawing.append((preview, self._executor.draw_preview(preview.latents)))
                drawn = True
        self._send_drawn()
        return drawn

    def end(self, request: Request, request_id: str) -> None:
        """A request has ended: the last message."""
        for subscriber in self._subscribers.pop(request, ()):
            if not subscriber.tell_end:
                continue
            error = engine_error(request) if request.state is State.FAILED else None
            message = RequestEnded(request_id, request.state.value, error)
            self._send(subscriber.identity, pickle.dumps(message))

    def drop(self, identities: Iterable[bytes]) -> None:
        """Forget clients that are gone."""
        gone = set(identities)
        for request, subscribers in list(self._subscribers.items()):
            left = [s for s in subscribers if s.identity not in gone]
            if left:
                self._subscribers[request] = left
            else:
                del self._subscribers[request]

    def _send_drawn(self) -> None:
        while self._drawing:
            preview, drawing = self._drawing[0]
            pixels = None
            with _no_preview_where_it_fails():
                pixels = drawing.pixels()
                if pixels is None:
                    return
            self._drawing.popleft()
            if pixels is not None and not preview.sequence.request.ended:
                for subscriber, update in preview.updates:
                    self._send(subscriber.identity, pickle.dumps(replace(update, preview=pixels)))


@contextmanager
def _no_preview_where_it_fails() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The picture itself may still succeed.
        logger.warning("krea2-srt: no preview: %s", first_line(error))
