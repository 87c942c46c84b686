"""JSON that takes its time: spaces go ahead of it, so that no proxy takes the call for dead."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from krea2_server.api.chunked_json import ChunkedJSONResponse
from krea2_server.api.event_stream import EventStreamResponse
from krea2_server.errors import ApiError, internal_error, set_outcome
from krea2_server.image_service import Generation, Result

logger = logging.getLogger(__name__)

Body = Callable[[Result], Iterable[bytes]]
"""Pieces of the response's body."""


async def kept_alive_json(
    scope: Scope, generation: Generation, body: Body, interval_s: float
) -> Response:
    """The response to a request that does not stream.

    What has ended within an interval is answered as ever. After that the status is 200, whatever
    comes; a request that fails then gets its error as the body, and the connection is broken, so
    that no client takes it for an answer.

    Args:
        generation: closed in any case.
        interval_s: seconds between two spaces.

    Raises:
        ApiError: it has failed within the first interval.
    """
    work = asyncio.create_task(generation.result())
    # Nobody may be there any more to hear of it.
    work.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close() -> None:
        work.cancel()
        generation.close()

    try:
        await asyncio.wait((work,), timeout=interval_s)
    except asyncio.CancelledError:
        close()
        raise
    if work.done():
        result = work.result()
        set_outcome(scope, "done")
        return ChunkedJSONResponse(body(result))
    return KeptAliveJSONResponse(_chunks(scope, work, body, interval_s), close)


class _BrokenError(Exception):
    """The response must not come to its end."""


class KeptAliveJSONResponse(EventStreamResponse):
    """Sends spaces and then JSON; left without an end, which breaks the connection, on failure."""

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(_BrokenError):
            await super().__call__(scope, receive, send)


async def _chunks(
    scope: Scope, work: asyncio.Task[Result], body: Body, interval_s: float
) -> AsyncGenerator[bytes, None]:
    while not work.done():
        yield b" "
        await asyncio.wait((work,), timeout=interval_s)
    try:
        result = work.result()
    except ApiError as failed:
        error = failed
    except Exception:
        logger.exception("a request failed")
        error = internal_error(scope["state"]["request_id"])
    else:
        set_outcome(scope, "done")
        for piece in body(result):
            yield piece
        return
    set_outcome(scope, error.code)
    logger.info("failed after its answer had begun, whose connection is closed: %s", error.code)
    yield orjson.dumps(error.body())
    raise _BrokenError
