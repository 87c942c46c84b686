"""openai-node, unchanged: responses, streams, errors, retries, aborts."""

import pytest

from krea2_srt.messages import EngineError
from tests.channel import wait_until
from tests.server.clients import packages
from tests.server.clients.pictures import from_base64, from_url
from tests.server.serving import serve

pytestmark = pytest.mark.slow

SCRIPT = "node/openai.mjs"
KEY = "sk-node-0123456789"
SMALL = {"prompt": "a fox", "size": "64x64"}


@pytest.fixture(scope="module")
def fake_server(shared_engine, tmp_path_factory):
    """One that asks for a key."""
    flags = ["--engine-endpoints", shared_engine.endpoint]
    environment = {"KREA2_SERVE_API_KEYS": KEY}
    with serve(tmp_path_factory.mktemp("keyed"), *flags, environment=environment) as server:
        yield server


def options(server, **more: object) -> dict:
    """Options of the client."""
    return {"baseURL": f"{server.url}/v1", "apiKey": KEY, **more}


def generate(server, client: dict | None = None, script: dict | None = None, **fields) -> dict:
    """What the client makes of a request.

    Args:
        client: options of it.
        script: what else the script is told.
        fields: of the request, beside a prompt and a size.
    """
    told = {"options": options(server, **(client or {})), "request": {**SMALL, **fields}}
    return packages.run(SCRIPT, **told, **(script or {}))


def test_pictures_come_as_base64(fake_server, engine):
    found = generate(fake_server, n=2, response_format="b64_json", seed=7)
    data = found["response"]["data"]
    assert [from_base64(image["b64_json"]).size for image in data] == [(64, 64)] * 2
    assert [from_base64(image["b64_json"]).getpixel((0, 0))[0] for image in data] == [7, 8]
    assert found["id"].startswith("req_")


def test_pictures_come_as_urls(fake_server, engine):
    found = generate(fake_server, n=2, response_format="url", output_format="webp", seed=7)
    pictures = [from_url(image["url"]) for image in found["response"]["data"]]
    assert [(picture.format, picture.size) for picture in pictures] == [("WEBP", (64, 64))] * 2


def test_a_stream_has_previews_and_then_the_pictures(fake_server, engine):
    found = generate(fake_server, n=2, stream=True, partial_images=2, seed=7)
    places = {
        kind: [
            (event["image_index"], event.get("partial_image_index"))
            for event in found["events"]
            if event["type"] == f"image_generation.{kind}"
        ]
        for kind in ("partial_image", "completed")
    }
    assert sorted(places["partial_image"]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places["completed"] == [(0, None), (1, None)]
    last = [from_base64(event["b64_json"]) for event in found["events"][-2:]]
    assert [picture.getpixel((0, 0))[0] for picture in last] == [7, 8]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "name", "status", "param"),
    [
        ({"size": "64y64"}, "BadRequestError", 400, "size"),
        ({"background": "transparent"}, "BadRequestError", 400, "background"),
        ({"model": "dall-e-3"}, "NotFoundError", 404, "model"),
    ],
)
def test_mistakes_are_the_clients_errors(fake_server, engine, stream, fields, name, status, param):
    error = generate(fake_server, stream=stream, **fields)["error"]
    assert (error["name"], error["status"], error["param"]) == (name, status, param)
    assert param in error["message"]
    assert error["code"]
    assert error["type"] == "invalid_request_error"
    assert error["requestID"].startswith("req_")
    assert not engine.requests


def test_a_wrong_key_is_an_authentication_error(fake_server, engine):
    error = generate(fake_server, {"apiKey": "sk-wrong-0123456789"})["error"]
    assert (error["name"], error["status"]) == ("AuthenticationError", 401)
    assert error["code"] == "invalid_api_key"
    assert not engine.requests


def test_a_failure_in_a_stream_is_thrown(fake_server, engine):
    engine.error = EngineError("out_of_memory", "cuda says no")
    error = generate(fake_server, stream=True)["error"]
    assert (error["name"], error["code"]) == ("APIError", "out_of_memory")


def test_a_full_queue_is_tried_again_after_the_time_that_it_tells(fake_server, engine):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=0.321)
    request = {"options": options(fake_server, maxRetries=20), "request": SMALL}
    process = packages.start(SCRIPT, **request)
    wait_until(lambda: engine.requests)
    engine.refuse = None
    found = packages.answer(process)
    assert len(found["response"]["data"]) == 1
    assert 321 in found["pauses"]
    assert len(engine.requests) >= 2


def test_a_full_queue_is_a_rate_limit_error(fake_server, engine):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=1.0)
    error = generate(fake_server)["error"]
    assert (error["name"], error["status"]) == ("RateLimitError", 429)


def test_an_abort_cancels_the_request(fake_server, engine):
    engine.hold.set()
    process = packages.start(SCRIPT, options=options(fake_server), request=SMALL, abort=True)
    wait_until(lambda: engine.waiting == 1)
    error = packages.answer(process)["error"]  # its stdin ends
    assert error["name"] == "APIUserAbortError"
    wait_until(lambda: engine.cancelled)
    assert engine.waiting == 0


def test_leaving_a_stream_cancels_its_request(fake_server, engine):
    engine.step_s = 0.2
    found = generate(fake_server, script={"events": 1}, stream=True, partial_images=3)
    assert [event["type"] for event in found["events"]] == ["image_generation.partial_image"]
    wait_until(lambda: engine.cancelled)
    assert engine.waiting == 0


def test_what_it_sends_is_on_the_page(relayed, engine, page_bodies):
    body = page_bodies["OpenAI's own"]
    client = {"baseURL": f"{relayed.url}/v1"}
    generate(relayed, client, **body)
    assert relayed.bodies == [body]
