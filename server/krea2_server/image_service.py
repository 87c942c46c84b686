"""The life of a request in the HTTP process: allowed, checked, generated, checked again, stored."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from krea2_server.api.parameters import GenerationParams
from krea2_server.engine.base import Engine, QueuePosition
from krea2_server.errors import ApiError, from_engine
from krea2_server.keys import Client, check_rights
from krea2_server.middleware.rate_limits import RateLimits
from krea2_server.moderation.moderator import ModerationUnavailableError, Moderator
from krea2_server.observability.metrics import Metrics
from krea2_server.observability.tracing import RequestSpan, Tracing
from krea2_server.storage.store import (
    ImageStore,
    ImageTooLargeError,
    StorageError,
    StorageFullError,
)
from krea2_srt.images import encode_image
from krea2_srt.messages import Accepted, Generated, ProgressUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """A picture on its way.

    Attributes:
        image: its index in the request.
        index: of this preview among the image's.
        step, total: steps done, of how many.
        data: a file in the request's format.
    """

    image: int
    index: int
    step: int
    total: int
    data: bytes


@dataclass(frozen=True)
class Result:
    """What was generated.

    Attributes:
        generated: the engine's answer, without an error.
        urls: of the images, where the client wants URLs.
    """

    generated: Generated
    urls: tuple[str, ...] | None


Update = QueuePosition | Accepted | ProgressUpdate | Preview | Result
"""What there is to know of a request on its way."""


class ImageService:
    """Generates what clients ask for.

    Args:
        engine: generates.
        limits: of each client.
        store: where images with URLs go; None where nobody may ask for them.
        moderator: checks content; None checks nothing.
        metrics, tracing: told of every request.

    Attributes:
        draining: whether nothing new is taken.
    """

    def __init__(
        self,
        engine: Engine,
        limits: RateLimits,
        store: ImageStore | None,
        moderator: Moderator | None,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self.draining = False
        self._engine = engine
        self._limits = limits
        self._store = store
        self._moderator = moderator
        self._metrics = metrics
        self._tracing = tracing

    async def generate(
        self, params: GenerationParams, client: Client, request_id: str, base_url: str
    ) -> AsyncGenerator[Update, None]:
        """A request from here to its `Result`, the last that is yielded.

        Args:
            client: who asks.
            base_url: how the client reaches this server.

        Raises:
            ApiError: it is not allowed, not possible, or has failed.
        """
        started = time.monotonic()
        with self._tracing.request(request_id, params) as span:
            updates = self._updates(params, client, request_id, base_url, span)
            try:
                async with aclosing(updates):
                    async for update in updates:
                        if isinstance(update, Result):
                            span.outcome = "done"
                            seconds = time.monotonic() - started
                            self._metrics.done(params, update.generated, seconds)
                        yield update
            except ApiError as error:
                span.outcome = error.code or str(error.status)
                raise
            except Exception:
                span.outcome = "internal_error"
                raise

    async def _updates(
        self,
        params: GenerationParams,
        client: Client,
        request_id: str,
        base_url: str,
        span: RequestSpan,
    ) -> AsyncGenerator[Update, None]:
        if self.draining:
            raise ApiError(
                503, "the server is shutting down", "draining", retry_after_s=5.0, retry=True
            )
        check_rights(client, params.priority, params.low_moderation)
        with self._limits.request(client):
            await self._check_prompts(params)
            async with aclosing(self._engine.generate(params.message(request_id))) as updates:
                previews: dict[int, int] = {}
                async for update in updates:
                    match update:
                        case Generated():
                            span.add_stages(update)
                            yield await self._result(params, update, base_url)
                        case ProgressUpdate(preview=pixels) if pixels is not None:
                            index = previews.get(update.sequence, 0)
                            previews[update.sequence] = index + 1
                            yield await self._preview(params, update, index, pixels)
                        case _:
                            yield update

    async def _result(
        self, params: GenerationParams, generated: Generated, base_url: str
    ) -> Result:
        if generated.error is not None:
            raise from_engine(generated.error)
        count, expected = len(generated.images), params.image.num_images
        if count != expected:
            raise AssertionError(f"the engine returned {count} images, expected {expected}")
        await self._check_images(params, list(generated.images))
        store = self._store
        if not params.as_url or store is None:
            return Result(generated, None)
        try:
            puts = [store.put(data, params.output_format, base_url) for data in generated.images]
            return Result(generated, tuple(await asyncio.gather(*puts)))
        except StorageError as error:
            logger.error("an image could not be stored: %s", error)
            text = f"{error}; ask for response_format b64_json"
            if isinstance(error, ImageTooLargeError):
                raise ApiError(503, text, "storage_full", retry=False) from None
            code = "storage_full" if isinstance(error, StorageFullError) else "storage_failed"
            text += ", or try again later"
            raise ApiError(503, text, code, retry_after_s=30.0, retry=True) from None

    async def _preview(
        self, params: GenerationParams, update: ProgressUpdate, index: int, pixels: Any
    ) -> Preview:
        data = await asyncio.to_thread(
            encode_image, pixels, params.output_format, params.compression
        )
        # What may not be shown at the end may not be shown on the way there.
        await self._check_images(params, [data])
        self._metrics.previews.inc()
        return Preview(update.sequence, index, update.step, update.total, data)

    async def _check_prompts(self, params: GenerationParams) -> None:
        if self._moderator is None:
            return
        try:
            verdict = await self._moderator.check_prompts(params.prompts, params.low_moderation)
        except ModerationUnavailableError as error:
            raise _unchecked(error) from None
        if not verdict.allowed:
            raise _refused("prompt", "the prompt", verdict.categories, verdict.checker)

    async def _check_images(self, params: GenerationParams, images: list[bytes]) -> None:
        if self._moderator is None:
            return
        try:
            verdict = await self._moderator.check_images(images, params.low_moderation)
        except ModerationUnavailableError as error:
            raise _unchecked(error) from None
        if not verdict.allowed:
            raise _refused(None, "the image", verdict.categories, verdict.checker)


def _refused(param: str | None, what: str, categories: tuple[str, ...], checker: str) -> ApiError:
    # Without the prompt: what was refused is nobody's to read in a log.
    logger.warning(
        "%s refused by the content policy",
        what,
        extra={"categories": ",".join(categories), "checker": checker},
    )
    return ApiError(
        400,
        f"{what} was refused by the content policy ({', '.join(categories)})",
        "content_policy_violation",
        param,
        retry=False,
    )


def _unchecked(error: ModerationUnavailableError) -> ApiError:
    logger.error("content could not be checked: %s", error)
    text = "the content could not be checked; try again later"
    return ApiError(503, text, "moderation_unavailable", retry_after_s=5.0, retry=True)
