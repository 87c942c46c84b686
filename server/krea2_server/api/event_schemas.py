"""Events of a stream in the server's OpenAPI document, where FastAPI describes only JSON bodies."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from krea2_server.api.schemas import CompletedEvent, ErrorResponse, PartialImageEvent

_REFERENCE = "#/components/schemas/{model}"
_EVENTS: dict[str, type[BaseModel]] = {
    "image_generation.partial_image": PartialImageEvent,
    "image_generation.completed": CompletedEvent,
    "error": ErrorResponse,
}


def event_stream_content() -> dict[str, Any]:
    """Content of the media type: every event has a name, and data that is its model's JSON."""
    events = [
        {
            "type": "object",
            "properties": {
                "event": {"const": name},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"$ref": _REFERENCE.format(model=model.__name__)},
                },
            },
            "required": ["event", "data"],
        }
        for name, model in _EVENTS.items()
    ]
    return {"itemSchema": {"oneOf": events}}


def event_components() -> dict[str, Any]:
    """The models that `event_stream_content` refers to, for the document's schemas."""
    _, definitions = models_json_schema(
        [(model, "serialization") for model in _EVENTS.values()], ref_template=_REFERENCE
    )
    components: dict[str, Any] = definitions["$defs"]
    return components
