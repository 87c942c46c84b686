"""The life of a request in the HTTP process: allowed, checked, generated, checked again, stored."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from krea2_server.adapters import unknown_adapter
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.engine.base import Engine, Job
from krea2_server.errors import ApiError, from_engine
from krea2_server.keys import Client, check_rights
from krea2_server.middleware.rate_limits import RateLimits
from krea2_server.moderation.moderator import ModerationUnavailableError, Moderator
from krea2_server.observability.metrics import Metrics
from krea2_server.observability.tracing import RequestSpan, Tracing, outcome_of
from krea2_server.storage.store import (
    ImagesTooLargeError,
    ImageStore,
    StorageError,
    StorageFullError,
    put_all,
)
from krea2_srt.errors import UnknownAdapterError
from krea2_srt.images import encode_image
from krea2_srt.messages import Generated, GenerateRequest, ProgressUpdate
from krea2_srt.request import ImageRequest

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


Update = ProgressUpdate | Preview | Result
"""What there is to know of a request on its way."""


class Generation:
    """A request that the engine has taken, on its way to its `Result`: iterate over `updates`, or
    await `result`, once; `close` in any case.

    Args:
        service: that it belongs to.
        asked: what the client sent.
        message: what the engine was asked for.
        client: the name of who asks.
        base_url: how the client reaches this server.
        job: it in the engine.
        span: its trace.
        resources: what is held for it, in the order to be given back.
        started: clock time in seconds at which it was submitted.
    """

    def __init__(
        self,
        service: "ImageService",
        asked: ImageGenerationRequest,
        message: GenerateRequest,
        client: str,
        base_url: str,
        job: Job,
        span: RequestSpan,
        resources: ExitStack,
        started: float,
    ) -> None:
        self._service = service
        self._asked = asked
        self._message = message
        self._client = client
        self._base_url = base_url
        self._job = job
        self._span = span
        self._resources = resources
        self._started = started

    @property
    def ahead(self) -> int:
        """Requests that will probably be generated before this one."""
        return self._job.ahead

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Steps and previews as they come; the last update is the `Result`.

        Raises:
            ApiError: it has failed.
        """
        previews: Counter[int] = Counter()
        with self._ending():
            async for update in self._job:
                match update:
                    case Generated():
                        yield await self._result(update)
                    case ProgressUpdate(preview=pixels) if pixels is not None:
                        yield await self._preview(update, previews[update.sequence], pixels)
                        previews[update.sequence] += 1
                    case _:
                        yield update

    async def result(self) -> Result:
        """What was generated, of a request that does not ask for progress.

        Raises:
            ApiError: it has failed.
        """
        with self._ending():
            update = await anext(self._job)
            assert isinstance(update, Generated), "nobody has asked for progress"
            return await self._result(update)

    def close(self) -> None:
        """Nobody waits any more: unless it has ended, it ends in the engine too."""
        self._resources.close()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        with self._resources, outcome_of(self._span):
            yield

    async def _result(self, generated: Generated) -> Result:
        self._span.add_stages(generated)
        if generated.error is not None:
            raise from_engine(generated.error)
        count, expected = len(generated.images), self._message.image.num_images
        if count != expected:
            raise AssertionError(f"the engine returned {count} images, expected {expected}")
        service = self._service
        await service.check_images(list(generated.images), self._asked.low_moderation)
        urls = None
        if self._asked.wants_urls:
            output_format = self._message.output_format
            urls = await service.store(generated.images, output_format, self._base_url)
        self._span.outcome = "done"
        seconds = time.monotonic() - self._started
        service.metrics.done(self._message, generated, self._client, seconds)
        return Result(generated, urls)

    async def _preview(self, update: ProgressUpdate, index: int, pixels: Any) -> Preview:
        message = self._message
        data = await asyncio.to_thread(encode_image, pixels, message.output_format, message.quality)
        # What may not be shown at the end may not be shown on the way there.
        await self._service.check_images([data], self._asked.low_moderation)
        self._service.metrics.previews.inc()
        return Preview(update.sequence, index, update.step, update.total, data)


class ImageService:
    """Generates what clients ask for.

    Args:
        engine: generates.
        limits: of each client.
        images: where images with URLs go; None where nobody may ask for them.
        moderator: checks content; None checks nothing.
        metrics, tracing: told of every request.

    Attributes:
        draining: whether nothing new is taken.
    """

    def __init__(
        self,
        engine: Engine,
        limits: RateLimits,
        images: ImageStore | None,
        moderator: Moderator | None,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self.draining = False
        self.metrics = metrics
        self._engine = engine
        self._limits = limits
        self._images = images
        self._moderator = moderator
        self._tracing = tracing

    @property
    def moderates(self) -> bool:
        """Whether content is checked."""
        return self._moderator is not None

    async def submit(
        self,
        asked: ImageGenerationRequest,
        message: GenerateRequest,
        client: Client,
        base_url: str,
        headers: Mapping[str, str],
    ) -> Generation:
        """Have a request generated that is checked completely.

        Args:
            asked: what the client sent.
            message: what the engine is asked for.
            client: who asks.
            base_url: how the client reaches this server.
            headers: of its request, which may name a trace.

        Returns:
            Once the engine has taken it.

        Raises:
            ApiError: it is not allowed, or the engine refuses it.
        """
        started = time.monotonic()
        with ExitStack() as resources:
            span = resources.enter_context(self._tracing.request(message, headers))
            with outcome_of(span):
                if self.draining:
                    text = "the server is shutting down"
                    raise ApiError(503, text, "draining", retry_after_s=5.0, retry=True)
                # Where nothing is moderated, nobody needs a right to less of it.
                low = asked.low_moderation and self.moderates
                check_rights(client, message.priority, low)
                resources.enter_context(self._limits.request(client))
                choices = message.adapters
                if not all(client.may_use(choice.name) for choice in choices):
                    # As of one that is not there: whose it is, is no client's to know.
                    raise await unknown_adapter(self._engine, client, asked, choices)
                await self._check_prompts(message.image, asked.low_moderation)
                try:
                    job = await self._engine.submit(message)
                except ApiError as error:
                    if error.code != UnknownAdapterError.code:
                        raise
                    raise await unknown_adapter(self._engine, client, asked, choices) from None
                resources.callback(job.close)
            kept = resources.pop_all()
            name = client.name
            return Generation(self, asked, message, name, base_url, job, span, kept, started)

    async def store(
        self, images: Sequence[bytes], output_format: str, base_url: str
    ) -> tuple[str, ...] | None:
        """Put images where they have URLs, all or none; None where there is no such place.

        Raises:
            ApiError: 503, they could not be stored.
        """
        store = self._images
        if store is None:
            return None
        try:
            return await put_all(store, images, output_format, base_url)
        except StorageError as error:
            logger.error("an image could not be stored: %s", error)
            text = f"{error}; ask for response_format b64_json"
            if isinstance(error, ImagesTooLargeError):
                raise ApiError(503, text, "storage_full", retry=False) from None
            code = "storage_full" if isinstance(error, StorageFullError) else "storage_failed"
            text += ", or try again later"
            raise ApiError(503, text, code, retry_after_s=30.0, retry=True) from None

    async def check_images(self, images: list[bytes], low: bool) -> None:
        """Check images by the content policy.

        Args:
            low: whether less strictly.

        Raises:
            ApiError: it refuses them, or they could not be checked.
        """
        if self._moderator is None:
            return
        try:
            verdict = await self._moderator.check_images(images, low)
        except ModerationUnavailableError as error:
            raise _unchecked(error) from None
        if not verdict.allowed:
            raise _refused(None, "the image", verdict.categories, verdict.checker)

    async def _check_prompts(self, image: ImageRequest, low: bool) -> None:
        if self._moderator is None:
            return
        prompts = [prompt for prompt in image.prompts if prompt]
        try:
            verdict = await self._moderator.check_prompts(prompts, low)
        except ModerationUnavailableError as error:
            raise _unchecked(error) from None
        if not verdict.allowed:
            raise _refused("prompt", "the prompt", verdict.categories, verdict.checker)


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
