"""``/sdapi/v1``: txt2img, its progress and its end, options, and what fills the menus."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from krea2_server.a1111.answers import txt2img_answer
from krea2_server.a1111.catalog import adapter_list, catalog, options
from krea2_server.a1111.reading import (
    MAX_WARNINGS,
    checkpoint_of,
    read_txt2img,
)
from krea2_server.a1111.running import Running, RunningRequests
from krea2_server.adapters import name_model_adapter
from krea2_server.api.chunked_json import ChunkedJSONResponse
from krea2_server.api.images import resolve_asked
from krea2_server.api.spelling import printable
from krea2_server.errors import ApiError, invalid, set_outcome
from krea2_server.image_service import Generation, Result
from krea2_server.keys import Client
from krea2_server.proxies.public_address import PublicAddress
from krea2_server.services import Services
from krea2_srt.messages import ProgressUpdate

PREFIX = "/sdapi/v1"


def a1111_router(services: Services) -> APIRouter:
    """Routes of A1111's API; no part of our own description."""
    router = APIRouter(prefix=PREFIX, include_in_schema=False)
    settings = services.settings
    requests = RunningRequests()
    address = PublicAddress(settings)

    @router.post("/txt2img")
    async def txt2img(request: Request, body: Annotated[dict[str, Any], Body()]) -> Response:
        asked = read_txt2img(body, settings.max_n)
        if asked.checkpoint is not None:
            param = f"{asked.overrides}.sd_model_checkpoint"
            adapter = services.check_model(asked.checkpoint, param)
            name_model_adapter(asked.request, adapter, param)
        message = resolve_asked(services, asked.request, request.state.request_id)
        message = replace(message, progress=True)
        client: Client = request.state.client
        with requests.request(client.name, message.image) as running:
            # No image gets a URL: nobody needs to know how the client reaches us.
            generation = await services.images.submit(
                asked.request, message, client, "", request.headers
            )
            try:
                result = await _followed(generation, running)
            finally:
                generation.close()
        set_outcome(request.scope, "done")
        pieces = txt2img_answer(asked, message, result.generated, services.names.own)
        return ChunkedJSONResponse(pieces)

    @router.get("/progress")
    async def progress(request: Request) -> Response:
        return JSONResponse(requests.progress(request.state.client.name))

    @router.post("/interrupt")
    async def interrupt(request: Request) -> Response:
        _check_page(request, settings.cors_origins, address)
        requests.interrupt(request.state.client.name)
        return JSONResponse({})

    @router.get("/options")
    async def get_options() -> Response:
        return JSONResponse(options(services.names.own))

    @router.post("/options")
    async def set_options(body: Annotated[dict[str, Any], Body()]) -> Response:
        checkpoint = checkpoint_of(body)
        if checkpoint is not None:
            param = "sd_model_checkpoint"
            if (adapter := services.check_model(checkpoint, param)) is not None:
                text = f"{param}: no option chooses an adapter; name it in the prompt"
                raise invalid(param, f"{text}, <lora:{adapter}:1>")
        # Some front ends send all that they have got back again.
        known = {**options(services.names.own), "sd_model_checkpoint": checkpoint}
        others = [name for name, value in body.items() if name not in known or known[name] != value]
        warnings = [
            f"{printable(name)}: has no effect; options cannot be changed here"
            for name in others[:MAX_WARNINGS]
        ]
        return JSONResponse({"warnings": warnings} if warnings else {})

    @router.post("/refresh-checkpoints")
    async def refresh_checkpoints() -> Response:
        # The list is always as it is.
        return JSONResponse({})

    @router.get("/loras")
    async def loras(request: Request) -> Response:
        client: Client = request.state.client
        found = await services.engine.adapters()
        return JSONResponse(adapter_list(i for i in found if client.may_use(i.name)))

    @router.post("/refresh-loras")
    async def refresh_loras() -> Response:
        # So is this one.
        return JSONResponse({})

    for name in catalog(()):
        _add_list(router, name, services)
    return router


def _check_page(request: Request, others: Sequence[str], address: PublicAddress) -> None:
    """Refuse what a page of somebody else's sends: without a body, no browser asks us before.

    Args:
        others: whose pages may beside our own.
    """
    origin = request.headers.get("origin")
    # Browsers say the one to https and to the local host only. What is no page says neither.
    foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if "*" in others or origin in others or (origin is None and not foreign):
        return
    if origin not in address.origins(request.scope):
        text = "pages of another origin may not; see --cors-origins"
        raise ApiError(403, text, "cross_origin")


def _add_list(router: APIRouter, name: str, services: Services) -> None:
    @router.get(f"/{name}")
    async def listed() -> Response:
        # Engines that others start say only later what the model is called.
        return JSONResponse(catalog(services.names.listed)[name])


async def _followed(generation: Generation, running: Running) -> Result:
    """The result of a request whose steps are counted."""
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            match update:
                case ProgressUpdate():
                    running.tell(update)
                case Result():
                    return update
    raise AssertionError("a request ends in its result, or in an error")
