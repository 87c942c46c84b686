"""What operators and machines ask: health, models, the queue, metrics."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from krea2_server.api.capabilities import capabilities
from krea2_server.api.schemas import (
    ErrorResponse,
    Model,
    ModelList,
    QueueState,
    Status,
)
from krea2_server.api.spelling import shown
from krea2_server.errors import ApiError
from krea2_server.keys import Client
from krea2_server.services import Services


def operations_router(services: Services) -> APIRouter:
    """Routes that generate nothing."""
    router = APIRouter()
    settings, engine = services.settings, services.engine

    @router.get("/ping", include_in_schema=False)
    @router.get("/health", summary="Whether the server is alive")
    async def health() -> Status:
        return Status(status="ok")

    @router.get(
        "/ready",
        summary="Whether the model is loaded and the engine answers",
        responses={200: {"model": Status}, 503: {"model": ErrorResponse}},
        response_model=None,
    )
    async def ready() -> Any:
        if services.images.draining:
            raise ApiError(503, "the server is shutting down", "draining")
        if not engine.num_ready:
            raise engine.unavailable()
        return Status(status="ready").model_dump()

    @router.get("/v1/models", summary="What is served", response_model_exclude_none=True)
    async def models(request: Request) -> ModelList:
        client: Client = request.state.client
        names = services.names
        found = [_model(name, client) for name in names.listed]
        if engine.num_ready and engine.model is not None and engine.model.adapters:
            found += [
                Model(id=f"{names.own}:{info.name}", created=services.started, parent=names.own)
                for info in await engine.adapters()
                if client.may_use(info.name) and not info.error
            ]
        return ModelList(data=found)

    @router.get(
        "/v1/models/{model:path}",
        summary="One of the models",
        responses={404: {"model": ErrorResponse}},
        response_model_exclude_none=True,
    )
    async def model(request: Request, model: Annotated[str, Path(max_length=256)]) -> Model:
        client: Client = request.state.client
        adapter = services.check_model(model)
        if adapter is None:
            return _model(model, client)
        infos = await engine.adapters()
        if not client.may_use(adapter) or all(info.name != adapter for info in infos):
            text = f"model: {shown(model)} is not served here"
            raise ApiError(404, text, "model_not_found", "model")
        parent = model.removesuffix(f":{adapter}")
        return _model(model, client).model_copy(update={"parent": parent})

    @router.get("/v1/queue", summary="How much is waiting")
    async def queue() -> QueueState:
        replicas = await engine.queue()
        return QueueState(
            waiting=sum(replica.waiting for replica in replicas),
            running=sum(replica.running for replica in replicas),
            estimated_wait_s=min((replica.outstanding_s for replica in replicas), default=None),
            replicas_ready=engine.num_ready,
            replicas=engine.num_replicas,
        )

    @router.get(
        "/metrics",
        summary="Metrics in Prometheus' text format",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(services.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _model(name: str, client: Client) -> Model:
        possible = None
        if engine.model is not None:
            possible = capabilities(
                engine.model,
                settings,
                client,
                stores=services.store is not None,
                moderates=services.images.moderates,
            )
        return Model(id=name, created=services.started, krea2=possible)

    return router
