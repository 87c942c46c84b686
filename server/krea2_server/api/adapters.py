"""Which adapters are served, and operators' commands to read them or to serve them no more."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field

from krea2_server.api.schemas import ErrorResponse
from krea2_server.errors import ApiError, invalid
from krea2_server.keys import Client
from krea2_server.services import Services
from krea2_srt.messages import AdapterInfo
from krea2_srt.request import ADAPTER_NAMES, is_adapter_name


class Adapter(BaseModel):
    """An adapter that requests may name."""

    name: str
    title: str | None
    trigger_words: list[str] = Field(description="That a prompt should hold.")
    default_scale: float = Field(description="Where a request says none.")
    where: Literal["device", "host", "disk"] = Field(
        description="Of all replicas, the one that has it nearest."
    )
    bytes: int = Field(description="Of its files.")
    sha256: str | None = Field(description="Of its files; null until they are read.")
    rank: int | None = Field(description="The largest; null until its files are read.")
    error: str | None = Field(description="Why it cannot be used; null where it can.")

    @classmethod
    def of(cls, info: AdapterInfo) -> "Adapter":
        return cls(
            name=info.name,
            title=info.title or None,
            trigger_words=list(info.trigger_words),
            default_scale=info.default_scale,
            where=info.where,
            bytes=info.bytes,
            sha256=info.digest or None,
            rank=info.rank or None,
            error=info.error or None,
        )


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]


class LoadAdapterRequest(BaseModel):
    """Body of ``POST /v1/load_lora_adapter``, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(max_length=256, description="Under which it is served.")
    lora_path: str | None = Field(
        default=None,
        max_length=1024,
        description="Of its file or folder in --lora-dir; by default where its name says.",
    )


class UnloadAdapterRequest(BaseModel):
    """Body of ``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(max_length=256)


class Unloaded(BaseModel):
    status: Literal["ok"] = "ok"


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 403, 404, 503)
}


def adapters_router(services: Services) -> APIRouter:
    """Routes of adapters."""
    router = APIRouter()
    engine = services.engine

    @router.get("/v1/loras", summary="Which adapters are served", responses=_ERRORS)
    async def loras(request: Request) -> AdapterList:
        client: Client = request.state.client
        found = await engine.adapters()
        return AdapterList(data=[Adapter.of(i) for i in found if client.may_use(i.name)])

    @router.post(
        "/v1/load_lora_adapter",
        summary="Read an adapter of the server's folder, and serve it",
        responses=_ERRORS,
    )
    async def load(request: Request, body: Annotated[LoadAdapterRequest, Body()]) -> Adapter:
        _check_admin(request.state.client)
        _check_name(body.lora_name)
        return Adapter.of(await engine.load_adapter(body.lora_name, body.lora_path or ""))

    @router.post(
        "/v1/unload_lora_adapter",
        summary="Serve an adapter no more, until it is loaded again",
        responses=_ERRORS,
    )
    async def unload(request: Request, body: Annotated[UnloadAdapterRequest, Body()]) -> Unloaded:
        _check_admin(request.state.client)
        _check_name(body.lora_name)
        await engine.unload_adapter(body.lora_name)
        return Unloaded()

    return router


def _check_admin(client: Client) -> None:
    if not client.admin:
        text = "this needs a key with admin: true; see docs/lora.md"
        raise ApiError(403, text, "not_allowed")


def _check_name(name: str) -> None:
    if not is_adapter_name(name):
        raise invalid("lora_name", f"lora_name: must be {ADAPTER_NAMES}")
