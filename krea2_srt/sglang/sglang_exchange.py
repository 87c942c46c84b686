"""SGLang's own requests: from `Req` to `OutputBatch`."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar

import numpy as np
from sglang.multimodal_gen.runtime.managers.progress_reporter import get_progress_reporter
from sglang.multimodal_gen.runtime.pipelines_core import Req
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.events import Progress
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.request import AdapterChoice, ImageRequest, RequestLimits
from krea2_srt.sglang.compat import check_group, finalize_output, merge_outputs, save_output
from krea2_srt.sglang.exchange import stage_ms
from krea2_srt.sglang.replies import Replies
from krea2_srt.sglang.requests import check_envelope, image_requests

logger = init_logger(__name__)


class SglangExchange:
    """An `Exchange` of one `Req`, or of several that are images of one request, saved together.

    Args:
        identity: of the client's socket.
        payload: what it sent.
        reqs: those in it.
        replies: how it is answered.
        server_args: SGLang's.
        metrics: SGLang's; None where it keeps none.
    """

    ASLEEP: ClassVar[str] = "Server is sleeping. Call resume_memory_occupation first."
    priority = 0
    deadline_s = None
    adapters: frozenset[AdapterChoice] = frozenset()
    held: object = None

    def __init__(
        self,
        identity: bytes,
        payload: Any,
        reqs: Sequence[Req],
        replies: Replies,
        server_args: Any,
        metrics: Any = None,
    ) -> None:
        self.identity = identity
        self.payload = payload
        self.reqs = list(reqs)
        self._replies = replies
        self._server_args = server_args
        self._metrics = metrics
        self._counts: list[int] = []
        self._request: Request | None = None
        if metrics is not None:
            now = time.monotonic()
            metrics.enqueue(id(payload), is_warmup=self.reqs[0].is_warmup, now=now)

    @property
    def request_id(self) -> str:
        return self.reqs[0].request_id or "unnamed"

    @property
    def profiled(self) -> bool:
        """Whether SGLang's profiler is to watch it."""
        return any(req.profile for req in self.reqs)

    def images(self, limits: RequestLimits) -> list[ImageRequest]:
        for req in self.reqs:
            check_envelope(req)
        images = [image_requests(req, limits) for req in self.reqs]
        check_group(self._replies.worker, self.reqs)
        self._counts = [len(some) for some in images]
        return [image for some in images for image in some]

    def accepted(self, request: Request) -> None:
        self._request = request
        self._report()
        for req in self.reqs:
            req.log(server_args=self._server_args)

    def started(self) -> None:
        if self._metrics is not None:
            self._metrics.dispatch(id(self.payload))

    def progress(self, event: Progress) -> None:
        self._report()

    def failed(self, error: Exception) -> None:
        output = OutputBatch(error=str(error))
        output.metrics = self.reqs[0].metrics
        self.reply(output)

    def abandoned(self, error: Exception) -> None:
        # SGLang counts what was answered, and drops an answer to nobody.
        self.failed(error)

    def finished(self, request: Request, pixels: Sequence[np.ndarray | None]) -> "Future[None]":
        return self._replies.submit(partial(self._save_and_reply, self._output(request, pixels)))

    def reply(self, output: OutputBatch) -> None:
        """Answer with an output that is complete."""
        self._replies.reply(self.identity, self.payload, output)

    def _output(self, request: Request, pixels: Sequence[np.ndarray | None]) -> OutputBatch:
        """What SGLang saves and sends, its pictures not yet encoded."""
        outputs, start = [], 0
        for req, count in zip(self.reqs, self._counts, strict=True):
            if req.metrics is not None:
                for name, ms in stage_ms(request).items():
                    req.metrics.record_stage(name, ms / 1e3)
                total_s = request.reached[State.DONE] - request.arrival
                req.metrics.total_duration_ms = total_s * 1e3
            images = list(pixels[start : start + count])
            start += count
            outputs.append(OutputBatch(output=images, metrics=req.metrics))
        return outputs[0] if len(outputs) == 1 else merge_outputs(outputs)

    def _save_and_reply(self, output: OutputBatch) -> None:
        worker = self._replies.worker
        try:
            finalize_output(worker, self.reqs[0], output, partial(save_output, worker, self.reqs))
        except Exception as error:
            # A full disk, a path that cannot be written.
            logger.error("krea2-srt: request %s: %s", self.request_id, error, exc_info=True)
            output = OutputBatch(error=f"the picture could not be saved: {error}")
        self.reply(output)

    def _report(self) -> None:
        """Tell SGLang's own progress channel how far it is, if it asks for that."""
        reporter, request = get_progress_reporter(), self._request
        if reporter is None or request is None:
            return
        for req in self.reqs:
            if req.report_progress and not req.is_warmup:
                reporter.step(
                    request_ids=req.client_request_ids(),
                    completed=sum(sequence.step for sequence in request.sequences),
                    total=sum(sequence.image.steps for sequence in request.sequences),
                )
