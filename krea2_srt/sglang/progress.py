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
from krea2_srt.engine.lifecycle import Request, Sequence
from krea2_srt.errors import first_line
from krea2_srt.messages import GenerateRequest, ProgressUpdate, preview_steps
from krea2_srt.runner.executor import Preview, RunnerExecutor
from krea2_srt.sglang.replies import SglangExchange

logger = init_logger(__name__)


def report_to_sglang(exchange: SglangExchange, request: Request) -> None:
    """Tell SGLang's own progress channel how far a request is, if it asks for that."""
    reporter = get_progress_reporter()
    if reporter is None:
        return
    for req in exchange.reqs:
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
    after_steps: dict[int, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Preview:
    """Latents to decode, and whom to send the picture, with which update."""

    sequence: Sequence
    latents: Tensor | None
    identity: bytes
    update: ProgressUpdate


class Subscriptions:
    """Which client wants to know how far its request is.

    Args:
        executor: decodes the previews.
        send: a pickled message to a client.
    """

    def __init__(self, executor: RunnerExecutor, send: Callable[[bytes, bytes], None]) -> None:
        self._executor = executor
        self._send = send
        self._subscribers: dict[Request, _Subscriber] = {}
        self._due: deque[_Preview] = deque()
        self._rendering: deque[tuple[_Preview, Preview]] = deque()

    def add(self, identity: bytes, message: GenerateRequest, request: Request) -> None:
        """Tell a client of each step of its request, and send the previews that it asked for."""
        subscriber = _Subscriber(identity, message.request_id)
        for sequence in request.sequences:
            if message.previews and not sequence.state.ended:
                steps = preview_steps(sequence.image.steps, message.previews)
                subscriber.after_steps[sequence.index] = steps
                self._executor.enable_previews(sequence)
        self._subscribers[request] = subscriber

    def step(self, progress: Progress) -> None:
        """A sequence has done a step."""
        sequence = progress.sequence
        subscriber = self._subscribers.get(sequence.request)
        if subscriber is None:
            return
        identity, request_id = subscriber.identity, subscriber.request_id
        update = ProgressUpdate(request_id, sequence.index, progress.step, progress.total)
        self._send(identity, pickle.dumps(update))
        if progress.step in subscriber.after_steps.get(sequence.index, ()):
            latents = self._executor.predict(sequence)
            self._due.append(_Preview(sequence, latents, identity, update))

    @property
    def rendering(self) -> bool:
        """Whether previews are under way that a next call of `render` should look after."""
        return bool(self._rendering)

    def render(self, max_ms: float) -> bool:
        """Render previews, those first that have been due for longest; whether there was one. What
        is rendered beside the steps is sent by a later call.

        Args:
            max_ms: after which no further one is begun: nothing should wait for more.
        """
        until = time.monotonic() + max_ms / 1e3
        rendered = False
        while self._due and not (rendered and time.monotonic() >= until):
            preview = self._due.popleft()
            # Of a request that has ended, the picture itself is there.
            if preview.latents is not None and not preview.sequence.request.ended:
                with _errors_logged():
                    self._rendering.append(
                        (preview, self._executor.render_preview(preview.latents))
                    )
                rendered = True
        self._send_rendered()
        return rendered

    def end(self, request: Request) -> None:
        """A request has ended, and its client is told by the answer."""
        self._subscribers.pop(request, None)

    def drop(self, identities: Iterable[bytes]) -> None:
        """Forget clients that are gone."""
        gone = set(identities)
        for request, subscriber in list(self._subscribers.items()):
            if subscriber.identity in gone:
                del self._subscribers[request]

    def _send_rendered(self) -> None:
        while self._rendering:
            preview, rendering = self._rendering[0]
            pixels = None
            with _errors_logged():
                pixels = rendering.pixels()
                if pixels is None:
                    return
            self._rendering.popleft()
            if pixels is not None and not preview.sequence.request.ended:
                message = replace(preview.update, preview=pixels)
                self._send(preview.identity, pickle.dumps(message))


@contextmanager
def _errors_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The picture itself may still succeed.
        logger.warning("krea2-srt: no preview: %s", first_line(error))
