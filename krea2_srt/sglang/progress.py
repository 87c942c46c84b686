"""Telling clients how far their requests are."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.managers.progress_reporter import get_progress_reporter
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.events import Progress
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.errors import Krea2Error, first_line
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.sglang.messages import ProgressUpdate, RequestEnded, Subscribe
from krea2_srt.sglang.replies import Item, engine_error

logger = init_logger(__name__)


def report_to_sglang(item: Item, progress: Progress) -> None:
    """Send a step to SGLang's own progress channel, if the request asks for that."""
    reporter = get_progress_reporter()
    if reporter is None:
        return
    request = progress.sequence.request
    for req in item.reqs:
        if req.report_progress and not req.is_warmup:
            reporter.step(
                request_ids=req.client_request_ids(),
                completed=sum(sequence.step for sequence in request.sequences),
                total=sum(sequence.image.steps for sequence in request.sequences),
            )


def preview_steps(total: int, previews: int) -> frozenset[int]:
    """After which of a sequence's steps to send a preview: evenly spread, never after the last."""
    previews = min(previews, total - 1)
    return frozenset(
        step for step in (round(total * i / (previews + 1)) for i in range(1, previews + 1))
    )


@dataclass
class _Subscriber:
    identity: bytes
    request_id: str
    previews: int
    after_steps: dict[int, frozenset[int]] = field(default_factory=dict)


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

    def add(self, identity: bytes, wish: Subscribe, requests: list[Request]) -> None:
        """Subscribe a client to the requests of an id."""
        if not requests:
            self._send(identity, pickle.dumps(RequestEnded(wish.request_id, "unknown")))
        for request in requests:
            subscriber = _Subscriber(identity, wish.request_id, wish.previews)
            for sequence in request.sequences:
                if wish.previews and not sequence.state.ended:
                    steps = preview_steps(sequence.image.steps, wish.previews)
                    subscriber.after_steps[sequence.index] = steps
                    self._executor.watch(sequence)
            self._subscribers.setdefault(request, []).append(subscriber)

    def step(self, progress: Progress) -> None:
        """A sequence has done a step."""
        sequence = progress.sequence
        subscribers = self._subscribers.get(sequence.request, ())
        preview = None
        for subscriber in subscribers:
            due = progress.step in subscriber.after_steps.get(sequence.index, ())
            if due and preview is None and sequence.state is State.DENOISING:
                try:
                    preview = self._executor.preview(sequence)
                except Krea2Error as error:
                    # The picture itself may still succeed.
                    logger.warning("krea2-srt: no preview: %s", first_line(error))
            update = ProgressUpdate(
                subscriber.request_id,
                sequence.index,
                progress.step,
                progress.total,
                preview if due else None,
            )
            self._send(subscriber.identity, pickle.dumps(update))

    def end(self, request: Request, request_id: str) -> None:
        """A request has ended."""
        for subscriber in self._subscribers.pop(request, ()):
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
