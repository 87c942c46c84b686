"""The server against its own description: whatever schemathesis makes up, no 500, and it fits."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from krea2_server.api.schemas import (
    CompletedEvent,
    ErrorResponse,
    ImageGenerationRequest,
    PartialImageEvent,
)
from tests.server.test_hostile_input import still_works

GENERATIONS = "/v1/images/generations"
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
EVENTS = {
    "image_generation.partial_image": PartialImageEvent,
    "image_generation.completed": CompletedEvent,
    "error": ErrorResponse,
}
load_all_checks()


@pytest.fixture(scope="module")
def operations(fake_server) -> list:
    found = schemathesis.openapi.from_url(f"{fake_server.url}/openapi.json").get_all_operations()
    return [result.ok() for result in found if isinstance(result, Ok)]


def test_there_is_something_to_test(operations):
    assert {operation.path for operation in operations} >= {
        GENERATIONS,
        "/v1/images/files/{name}",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/queue",
        "/health",
        "/ready",
        "/metrics",
    }


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_fits_its_description(operations, fake_server, engine, mode):
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing in it can be wrong
        # The others have hardly anything to vary.
        examples = settings().max_examples if operation.path == GENERATIONS else 20

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call()
            assert response.headers["x-request-id"][0].startswith("req_")
            case.validate_response(response, checks=CHECKS)
            if response.headers["content-type"][0].startswith("text/event-stream"):
                check_events(response.content.decode())

        check()
    still_works(fake_server)
    assert "Traceback" not in fake_server.log


def check_events(text: str) -> None:
    events = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert events
    for block in events:
        name, data = block.removeprefix("event: ").split("\ndata: ")
        EVENTS[name].model_validate_json(data, extra="forbid")
    assert text.endswith(": end\n\n")


def test_a_streams_events_are_described(fake_server):
    document = fake_server.get("/openapi.json").json()
    content = document["paths"][GENERATIONS]["post"]["responses"]["200"]["content"]
    described = {}
    for event in content["text/event-stream"]["itemSchema"]["oneOf"]:
        reference = event["properties"]["data"]["contentSchema"]["$ref"]
        described[event["properties"]["event"]["const"]] = reference.rsplit("/", 1)[1]
    assert described == {name: model.__name__ for name, model in EVENTS.items()}
    assert document["components"]["schemas"].keys() >= set(described.values())


def test_no_error_is_described_that_is_never_sent(fake_server):
    text = fake_server.get("/openapi.json").text
    assert '"422"' not in text
    assert "ValidationError" not in text


def test_all_fields_are_described(fake_server):
    document = fake_server.get("/openapi.json").json()
    request = document["components"]["schemas"]["ImageGenerationRequest"]
    assert request["properties"].keys() == ImageGenerationRequest.model_fields.keys()
    assert request["additionalProperties"] is False
    undescribed = [
        name
        for name, field in request["properties"].items()
        if not field.get("description") and name not in ("user", "safety_identifier")
    ]
    assert undescribed == []
