"""From an ended request to SGLang's reply."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
from sglang.multimodal_gen.runtime.pipelines_core import Req
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.platforms import current_platform
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.errors import (
    DeadlineError,
    DrainingError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)
from krea2_srt.messages import EngineError
from krea2_srt.sglang.compat import finalize_output, merge_outputs, save_output

logger = init_logger(__name__)

THREADS = 4

_CODES: dict[type[Exception], str] = {
    RequestError: "invalid_request",
    ValueError: "invalid_request",
    QueueFullError: "queue_full",
    DrainingError: "draining",
    DeadlineError: "deadline",
    OutOfMemoryError: "out_of_memory",
}

# What a request's time is spent on: the states that begin and end each stage.
_STAGES = (
    ("queue", State.WAITING, State.ENCODING),
    ("encode", State.ENCODING, State.DENOISING),
    ("denoise", State.DENOISING, State.DECODING),
    ("decode", State.DECODING, State.DONE),
)


@dataclass(frozen=True)
class SglangExchange:
    """What came over the channel, to be answered once.

    Attributes:
        identity: of the client's socket.
        payload: what it sent.
        reqs: SGLang's requests in it; several are images of one request, saved together.
        counts: images of each of them.
        arrival: clock time in seconds.
    """

    identity: bytes
    payload: Any
    reqs: tuple[Req, ...] = ()
    counts: tuple[int, ...] = ()
    arrival: float = field(default_factory=time.monotonic)

    @property
    def request_id(self) -> str:
        return (self.reqs[0].request_id if self.reqs else None) or "unnamed"


def summary(request: Request) -> str:
    """One line about a request that is done, for the log."""
    image = request.images[0]
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in stage_ms(request).items())
    total = (request.reached[State.DONE] - request.arrival) * 1e3
    what = f"{len(request.images)} x {image.width}x{image.height}, {image.steps} steps"
    return f"done in {total:.0f} ms ({stages}); {what}"


def stage_ms(request: Request) -> dict[str, float]:
    """Milliseconds that a request that is done has spent in each stage."""
    at = request.reached
    return {name: (at[end] - at[start]) * 1e3 for name, start, end in _STAGES}


def finished(
    exchange: SglangExchange, request: Request, pixels: Sequence[np.ndarray | None]
) -> OutputBatch:
    """The output of a request that is done, its pictures not yet encoded.

    Args:
        pixels: uint8 [height, width, 3] of each of its images.
    """
    outputs, start = [], 0
    for req, count in zip(exchange.reqs, exchange.counts, strict=True):
        if req.metrics is not None:
            for name, ms in stage_ms(request).items():
                req.metrics.record_stage(name, ms / 1e3)
            req.metrics.total_duration_ms = (request.reached[State.DONE] - request.arrival) * 1e3
        images = list(pixels[start : start + count])
        start += count
        outputs.append(OutputBatch(output=images, metrics=req.metrics))
    if len(outputs) == 1:
        return outputs[0]
    return merge_outputs(outputs)


def failed(exchange: SglangExchange, reason: Request | Exception) -> OutputBatch:
    """The output of a request that was refused, failed or cancelled."""
    output = OutputBatch(error=engine_error(reason).message)
    if exchange.reqs:
        output.metrics = exchange.reqs[0].metrics
    return output


def engine_error(reason: Request | Exception) -> EngineError:
    """Why a request was refused, failed or was cancelled."""
    if isinstance(reason, Request):
        if reason.error is None:
            return EngineError("cancelled", "the request was cancelled")
        reason = reason.error
    return EngineError(
        _CODES.get(type(reason), "failed"),
        str(reason),
        getattr(reason, "field", None),
        getattr(reason, "retry_after_s", None),
    )


class ReplyThreads:
    """Encodes and saves pictures off the loop, the way SGLang's worker does, and replies.

    Args:
        worker: SGLang's.
        reply: sends an output; takes the socket's lock, and raises nothing.
    """

    def __init__(
        self, worker: GPUWorker, reply: Callable[[SglangExchange, OutputBatch], None]
    ) -> None:
        self._worker = worker
        self._reply = reply
        # A thread begins on GPU 0, whichever is ours.
        device = current_platform.get_device(worker.local_rank)
        use_device = partial(current_platform.set_device, device)
        self._pool = ThreadPoolExecutor(
            THREADS,
            "krea2-reply",
            initializer=None if current_platform.is_cpu() else use_device,
        )

    def start(self, exchange: SglangExchange, output: OutputBatch) -> "Future[None]":
        """Reply with a finished output as soon as its pictures are encoded."""
        return self._pool.submit(self._run, exchange, output)

    def submit(self, reply: Callable[[], None]) -> "Future[None]":
        """Reply in another way, in one of the same threads; raises nothing."""
        return self._pool.submit(reply)

    def finish(self) -> None:
        """Wait for all replies."""
        self._pool.shutdown(wait=True)

    def _run(self, exchange: SglangExchange, output: OutputBatch) -> None:
        try:
            save = partial(save_output, self._worker, exchange.reqs)
            finalize_output(self._worker, exchange.reqs[0], output, save)
        except Exception as error:
            # A full disk, a path that cannot be written.
            logger.error("krea2-srt: request %s: %s", exchange.request_id, error, exc_info=True)
            output = OutputBatch(error=f"the picture could not be saved: {error}")
        self._reply(exchange, output)
