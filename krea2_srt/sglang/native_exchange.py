"""Requests of clients that speak our own messages: from `GenerateRequest` to `Generated`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from krea2_srt.engine.lifecycle import Request
from krea2_srt.errors import RequestError
from krea2_srt.images import FORMATS, encode_image
from krea2_srt.messages import VERSION, Generated, GenerateRequest
from krea2_srt.model.text_encoder import TextEncoder
from krea2_srt.request import MAX_TEXT_TOKENS, ImageRequest
from krea2_srt.sglang.replies import engine_error, stage_ms


@dataclass(frozen=True)
class NativeExchange:
    """A `GenerateRequest` in the engine, to be answered once.

    Attributes:
        identity: of the client's socket.
        message: what it sent.
        arrival: clock time in seconds.
    """

    identity: bytes
    message: GenerateRequest
    arrival: float = field(default_factory=time.monotonic)

    @property
    def request_id(self) -> str:
        return self.message.request_id

    def check(self) -> None:
        """Check what the engine does not look at.

        Raises:
            RequestError: naming the field.
        """
        if self.message.version != VERSION:
            raise RequestError("version", f"must be {VERSION}, got {self.message.version}")
        if not isinstance(self.message.image, ImageRequest):
            raise RequestError("image", "must be an ImageRequest")
        if not isinstance(self.message.previews, int) or self.message.previews < 0:
            raise RequestError("previews", "must be a whole number from 0 on")
        if self.message.output_format not in FORMATS:
            raise RequestError("output_format", f"must be one of {', '.join(FORMATS)}")

    def failed(self, reason: Request | Exception) -> Generated:
        """The answer to a request that was refused, failed or cancelled."""
        return Generated(self.request_id, error=engine_error(reason))

    def finished(
        self, request: Request, pixels: Sequence[np.ndarray | None], text_encoder: TextEncoder
    ) -> Generated:
        """The answer to one that is done; encodes its pictures.

        Args:
            pixels: uint8 [height, width, 3] of each of its images.
        """
        message, first = self.message, request.sequences[0]
        image_tokens = first.image.image_tokens
        text_tokens = [tokens - image_tokens for tokens in first.tokens]
        branches = zip((first.image.prompt, first.image.negative_prompt), text_tokens, strict=False)
        return Generated(
            self.request_id,
            tuple(
                encode_image(picture, message.output_format, message.quality)
                for picture in pixels
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
        )
