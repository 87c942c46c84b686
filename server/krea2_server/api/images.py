"""``POST /v1/images/generations``, and the files behind its URLs."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Annotated, Any, BinaryIO

import orjson
from fastapi import APIRouter, Body, Request
from fastapi.responses import Response, StreamingResponse

from krea2_server.adapters import name_model_adapter
from krea2_server.api.chunked_json import ChunkedJSONResponse
from krea2_server.api.event_schemas import event_stream_content
from krea2_server.api.event_stream import EventStreamResponse, comment, event
from krea2_server.api.kept_alive_json import kept_alive_json
from krea2_server.api.lenient import request_model
from krea2_server.api.parameters import resolve
from krea2_server.api.responses import ResponseBuilder
from krea2_server.api.schemas import ErrorResponse, ImageGenerationRequest, ImagesResponse
from krea2_server.errors import ApiError, internal_error, invalid, set_outcome
from krea2_server.image_service import Generation, Result, Update
from krea2_server.keys import Client
from krea2_server.proxies.public_address import PublicAddress
from krea2_server.services import Services
from krea2_server.storage.local import ExpiredFileError, LocalStore, UnknownFileError
from krea2_srt.messages import GenerateRequest

logger = logging.getLogger(__name__)

FILES_PATH = "/v1/images/files"

_CHUNK_BYTES = 2**18

_ERROR_STATUS = (400, 401, 403, 404, 408, 413, 415, 429, 499, 500, 503, 504)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in _ERROR_STATUS
}


def images_router(services: Services) -> APIRouter:
    """Routes that generate and that serve what was generated."""
    router = APIRouter()
    settings = services.settings
    address = PublicAddress(settings)
    body_model = request_model(settings.accept, settings.allow_unknown_fields)

    @router.post(
        "/v1/images/generations",
        summary="Generate images",
        response_class=Response,
        responses={
            200: {
                "model": ImagesResponse,
                "description": "Images, or with stream the events on their way.",
                "content": {"text/event-stream": event_stream_content()},
            },
            **_ERRORS,
        },
    )
    async def generate(
        request: Request,
        body: Annotated[body_model, Body()],  # type: ignore[valid-type]
    ) -> Response:
        asked: ImageGenerationRequest = body
        deployment: str | None = getattr(request.state, "deployment", None)
        if asked.model is None:
            asked.model = deployment
        elif deployment is not None:
            name_model_adapter(asked, services.check_model(deployment), "the path's model")
        message = resolve_asked(services, asked, request.state.request_id)
        client: Client = request.state.client
        base_url = address.base_url(request.scope) if asked.wants_urls else ""
        generation = await services.images.submit(asked, message, client, base_url, request.headers)
        builder = ResponseBuilder(asked, message, services.names.own)
        if asked.stream:
            events = _events(request, generation, builder, services.settings.keepalive_s)
            return EventStreamResponse(events, generation.close)
        # HTTP/1.0 has no way to send a body whose length is not known yet but to hang up after it.
        if settings.json_keepalive_s and request.scope["http_version"] != "1.0":
            interval_s = settings.json_keepalive_s
            return await kept_alive_json(request.scope, generation, builder.response, interval_s)
        result = await generation.result()
        set_outcome(request.scope, "done")
        return ChunkedJSONResponse(builder.response(result))

    if isinstance(services.store, LocalStore):
        _add_files(router, services.store)
    return router


def _add_files(router: APIRouter, store: LocalStore) -> None:
    @router.get(
        FILES_PATH + "/{name:path}",
        summary="An image behind a URL",
        response_class=StreamingResponse,
        responses={
            200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}},
            404: {"model": ErrorResponse},
            410: {"model": ErrorResponse},
        },
    )
    async def file(name: str, expires: str = "", signature: str = "") -> Response:
        try:
            found = await store.get(name, expires, signature)
        except UnknownFileError:
            raise ApiError(404, "there is no such image", "not_found") from None
        except ExpiredFileError:
            raise ApiError(410, "the image has expired", "expired") from None
        # Not Starlette's FileResponse: it looks at the path again, and by then it may be gone.
        return StreamingResponse(
            _chunks(found.file),
            media_type=found.media_type,
            headers={
                "content-length": str(found.size),
                "cache-control": f"private, immutable, max-age={int(found.remaining_s)}",
            },
        )


async def _chunks(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
            yield chunk


def resolve_asked(
    services: Services, body: ImageGenerationRequest, request_id: str
) -> GenerateRequest:
    """What the engine is to be asked for, by this server's settings and its model.

    Args:
        request_id: what the engine is to call it.

    Raises:
        ApiError: a field is wrong, or no engine has come up yet.
    """
    settings, model = services.settings, services.engine.model
    if body.response_format is None:
        body.response_format = settings.default_response_format
    if body.model is not None:
        param = body.sent_as("model")
        name_model_adapter(body, services.check_model(body.model, param), param)
    if services.store is None and body.wants_urls:
        name = body.sent_as("response_format")
        text = f"{name}: must be b64_json; this server keeps no images"
        raise invalid(name, text, "unsupported_value")
    if model is None:
        raise services.engine.unavailable()
    return resolve(
        body,
        request_id,
        model,
        max_n=settings.max_n,
        max_prompt=settings.max_prompt,
        default_size=settings.default_size,
        model_name=services.names.own,
        default_embed_metadata=settings.default_embed_metadata,
    )


async def _events(
    request: Request, generation: Generation, builder: ResponseBuilder, keepalive_s: float
) -> AsyncGenerator[bytes, None]:
    """The stream of a request that was accepted; a failure is its last event."""
    updates = generation.updates()
    upcoming: asyncio.Task[Update] | None = None
    try:
        yield builder.waiting(generation.ahead)
        while True:
            if upcoming is None:
                upcoming = asyncio.create_task(anext(updates))
            await asyncio.wait((upcoming,), timeout=keepalive_s)
            if not upcoming.done():
                yield builder.waiting(generation.ahead)
                continue
            task, upcoming = upcoming, None
            update = task.result()
            if isinstance(update, Result):
                set_outcome(request.scope, "done")
            for chunk in builder.events(update):
                yield chunk
            if isinstance(update, Result):
                break
    except ApiError as error:
        set_outcome(request.scope, error.code)
        yield event("error", orjson.dumps(error.body()))
    except Exception:
        logger.exception("a stream failed")
        set_outcome(request.scope, "internal_error")
        body = internal_error(request.state.request_id).body()
        yield event("error", orjson.dumps(body))
    finally:
        try:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
        finally:
            await updates.aclose()
    yield comment("end")
