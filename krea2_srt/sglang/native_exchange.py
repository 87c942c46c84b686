"""Requests of clients that speak our own messages: from `GenerateRequest` to `Generated`."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import ClassVar

import numpy as np
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.events import Progress
from krea2_srt.engine.lifecycle import Request
from krea2_srt.errors import ModelError, RequestError
from krea2_srt.images import FORMATS, encode_image
from krea2_srt.infotext import infotext
from krea2_srt.messages import (
    VERSION,
    Accepted,
    EngineError,
    Generated,
    GenerateRequest,
    ProgressUpdate,
    preview_steps,
)
from krea2_srt.model.text_encoder import TextEncoder
from krea2_srt.request import (
    MAX_TEXT_TOKENS,
    AdapterChoice,
    ImageRequest,
    RequestLimits,
    check_choices,
)
from krea2_srt.sglang.exchange import stage_ms
from krea2_srt.sglang.previews import Previews
from krea2_srt.sglang.replies import Replies

logger = init_logger(__name__)


class NativeExchange:
    """An `Exchange` of a `GenerateRequest`.

    Args:
        identity: of the client's socket.
        message: what it sent.
        replies: how it is answered.
        previews: that it may ask for.
    """

    ASLEEP: ClassVar[str] = "the engine is asleep"
    held: object = None

    def __init__(
        self, identity: bytes, message: GenerateRequest, replies: Replies, previews: Previews
    ) -> None:
        self.identity = identity
        self.message = message
        self._replies = replies
        self._previews = previews

    @property
    def request_id(self) -> str:
        return self.message.request_id

    @property
    def priority(self) -> int:
        return self.message.priority

    @property
    def deadline_s(self) -> float | None:
        return self.message.deadline_s

    @property
    def adapters(self) -> frozenset[AdapterChoice]:
        return self.message.adapters

    def images(self, limits: RequestLimits) -> list[ImageRequest]:
        message = self.message
        if message.version != VERSION:
            raise RequestError("version", f"must be {VERSION}, got {message.version}")
        if not isinstance(message.request_id, str):
            raise RequestError("request_id", f"must be text, got {type(message.request_id)}")
        if not isinstance(message.image, ImageRequest):
            raise RequestError("image", "must be an ImageRequest")
        if message.image.adapters:
            raise RequestError("image", "must be without adapters; they are given beside it")
        check_choices(message.adapters)
        if not isinstance(message.previews, int) or message.previews < 0:
            raise RequestError("previews", "must be a whole number from 0 on")
        if message.output_format not in FORMATS:
            raise RequestError("output_format", f"must be one of {', '.join(FORMATS)}")
        if not isinstance(message.quality, int) or not 0 <= message.quality <= 100:
            raise RequestError("quality", f"must be between 0 and 100, got {message.quality!r}")
        if not isinstance(message.infotext_model, str):
            raise RequestError("infotext_model", "must be text")
        return [message.image]

    def accepted(self, request: Request) -> None:
        self._replies.send(self.identity, Accepted(self.request_id))
        if self._sends_previews:
            for sequence in request.sequences:
                sequence.wants_previews = True

    def started(self) -> None:
        """The first step tells."""

    def progress(self, event: Progress) -> None:
        if not self.message.progress:
            return
        sequence = event.sequence
        update = ProgressUpdate(self.request_id, sequence.index, event.step, event.total)
        self._replies.send(self.identity, update)
        if self._sends_previews and event.step in preview_steps(event.total, self.message.previews):
            self._previews.add(
                sequence,
                lambda pixels: self._replies.send(self.identity, replace(update, preview=pixels)),
            )

    def failed(self, error: Exception) -> None:
        self._replies.send(self.identity, Generated(self.request_id, error=EngineError.of(error)))

    def abandoned(self, error: Exception) -> None:
        """Whoever has stopped listening is told nothing."""

    def finished(self, request: Request, pixels: Sequence[np.ndarray | None]) -> "Future[None]":
        return self._replies.submit(lambda: self._send_generated(request, pixels))

    @property
    def _sends_previews(self) -> bool:
        return self.message.progress and self.message.previews > 0

    def _send_generated(self, request: Request, pixels: Sequence[np.ndarray | None]) -> None:
        try:
            text_encoder = self._replies.worker.pipeline.runner.text_encoder
            generated = self._generated(request, pixels, text_encoder)
        except Exception as error:
            logger.exception("krea2-srt: request %s: not encoded", self.request_id)
            kind = type(error).__name__
            self.failed(ModelError(f"the picture could not be encoded: {kind}"))
            return
        self._replies.send(self.identity, generated)

    def _generated(
        self, request: Request, pixels: Sequence[np.ndarray | None], text_encoder: TextEncoder
    ) -> Generated:
        message, first = self.message, request.sequences[0]
        image_tokens = first.image.image_tokens
        text_tokens = [tokens - image_tokens for tokens in first.tokens]
        branches = zip((first.image.prompt, first.image.negative_prompt), text_tokens, strict=False)
        return Generated(
            self.request_id,
            tuple(
                encode_image(
                    picture,
                    message.output_format,
                    message.quality,
                    infotext(sequence.image, message.infotext_model),
                )
                for picture, sequence in zip(pixels, request.sequences, strict=True)
                if picture is not None
            ),
            text_tokens=sum(text_tokens),
            image_tokens=image_tokens * len(request.sequences),
            # A context that is not full has not been cut.
            prompt_cut=any(
                tokens == MAX_TEXT_TOKENS and text_encoder.tokenize(prompt)[1]
                for prompt, tokens in branches
            ),
            stage_ms=stage_ms(request),
            adapters=tuple(sorted(first.image.adapters, key=lambda use: use.name)),
        )
