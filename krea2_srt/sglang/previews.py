"""Previews: decoded between units of work or beside them, and sent when they are there."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from torch import Tensor

from krea2_srt.engine.lifecycle import Sequence
from krea2_srt.errors import first_line
from krea2_srt.runner.executor import Preview, RunnerExecutor

logger = init_logger(__name__)


@dataclass(frozen=True)
class _Due:
    """Latents to decode, and what to do with the picture."""

    sequence: Sequence
    latents: Tensor | None
    send: Callable[[np.ndarray], None]


class Previews:
    """The previews that clients wait for.

    Args:
        executor: decodes them.
    """

    def __init__(self, executor: RunnerExecutor) -> None:
        self._executor = executor
        self._due: deque[_Due] = deque()
        self._rendering: deque[tuple[_Due, Preview]] = deque()

    def add(self, sequence: Sequence, send: Callable[[np.ndarray], None]) -> None:
        """Have a picture made of the last step of a sequence.

        Args:
            send: given the picture, uint8 [height, width, 3]; not called once the request has
                ended: then the picture itself is there.
        """
        self._due.append(_Due(sequence, self._executor.predict(sequence), send))

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
            due = self._due.popleft()
            if due.latents is not None and not due.sequence.request.ended:
                with _errors_logged():
                    self._rendering.append((due, self._executor.render_preview(due.latents)))
                rendered = True
        self._send_rendered()
        return rendered

    def _send_rendered(self) -> None:
        while self._rendering:
            due, rendering = self._rendering[0]
            pixels = None
            with _errors_logged():
                pixels = rendering.pixels()
                if pixels is None:
                    return
            self._rendering.popleft()
            if pixels is not None and not due.sequence.request.ended:
                due.send(pixels)


@contextmanager
def _errors_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The picture itself may still succeed.
        logger.warning("krea2-srt: no preview: %s", first_line(error))
