"""Vercel's ai, unchanged, with both providers that speak OpenAI's API."""

import base64
import io

import pytest
from PIL import Image

from krea2_srt.messages import EngineError
from tests.channel import wait_until
from tests.server.clients import packages
from tests.server.clients.pictures import from_base64

pytestmark = pytest.mark.slow

OPENAI, COMPATIBLE = PROVIDERS = ("@ai-sdk/openai", "@ai-sdk/openai-compatible")
SCRIPT = "node/vercel.mjs"


def arguments(server, provider: str, request: dict) -> dict:
    options = {"baseURL": f"{server.url}/v1", "apiKey": "none"}
    if provider == COMPATIBLE:
        options["name"] = "krea2"
    request = {"prompt": "a fox", "size": "64x64", **request}
    return {"provider": provider, "options": options, "model": "krea-2-turbo", "request": request}


def generate(server, provider: str, **request: object) -> dict:
    """generateImage of a small picture, with more options."""
    return packages.run(SCRIPT, **arguments(server, provider, request))


def names(warnings: list[dict]) -> list[str]:
    return sorted({warning["feature"] for warning in warnings})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pictures_come_with_what_they_cost(fake_server, engine, provider):
    found = generate(fake_server, provider, n=2)
    pictures = [from_base64(image["base64"]) for image in found["images"]]
    assert [(picture.format, picture.size) for picture in pictures] == [("PNG", (64, 64))] * 2
    assert [image["mediaType"] for image in found["images"]] == ["image/png"] * 2
    assert found["warnings"] == []
    assert found["usage"]["outputTokens"] == 2 * 16


def test_each_of_openais_pictures_is_a_request_of_its_own(fake_server, engine):
    """Its provider knows which models draw several at once, and ours is none of them."""
    generate(fake_server, OPENAI, n=3)
    assert [request.image.num_images for request in engine.requests] == [1, 1, 1]
    engine.requests.clear()
    generate(fake_server, OPENAI, n=3, maxImagesPerCall=10)
    assert [request.image.num_images for request in engine.requests] == [3]
    engine.requests.clear()
    generate(fake_server, COMPATIBLE, n=3)
    assert [request.image.num_images for request in engine.requests] == [3]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_it_does_not_send_it_warns_of(relayed, engine, provider):
    found = generate(relayed, provider, seed=7, aspectRatio="16:9")
    assert names(found["warnings"]) == ["aspectRatio", "seed"]
    (body,) = relayed.bodies
    assert body.keys().isdisjoint({"seed", "aspectRatio", "aspect_ratio"})


def test_options_of_the_compatible_provider_are_fields_of_ours(fake_server, engine):
    fields = {"seed": 7, "quality": "low", "output_format": "webp", "aspectRatio": "2:1"}
    found = generate(fake_server, COMPATIBLE, size=None, providerOptions={"krea2": fields})
    (picture,) = (from_base64(image["base64"]) for image in found["images"])
    assert (picture.format, round(picture.width / picture.height)) == ("WEBP", 2)
    (request,) = engine.requests
    assert (request.image.seed, request.image.steps) == (7, 4)


def test_options_of_openais_provider_are_openais_fields(fake_server, engine):
    fields = {"quality": "low", "outputFormat": "jpeg", "outputCompression": 30, "user": "u-1"}
    found = generate(fake_server, OPENAI, providerOptions={"openai": fields})
    assert [image["mediaType"] for image in found["images"]] == ["image/jpeg"]
    (request,) = engine.requests
    assert (request.image.steps, request.output_format, request.quality) == (4, "jpeg", 30)
    (metadata,) = found["providerMetadata"]["openai"]["images"]
    assert (metadata["quality"], metadata["outputFormat"]) == ("low", "jpeg")


def test_the_compatible_provider_follows_urls(fake_server, engine):
    fields = {"response_format": "url", "seed": 9}
    found = generate(fake_server, COMPATIBLE, providerOptions={"krea2": fields})
    (picture,) = (from_base64(image["base64"]) for image in found["images"])
    assert picture.getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_mistakes_are_told_and_not_tried_again(fake_server, engine, provider):
    error = generate(fake_server, provider, size="64y64", maxRetries=2)["error"]
    assert (error["name"], error["statusCode"]) == ("AI_APICallError", 400)
    assert not error["isRetryable"]
    assert error["message"].startswith("size: must be ")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_picture_to_edit_is_refused_with_what_is_wrong(fake_server, engine, provider):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    error = generate(fake_server, provider, prompt={"text": "a fox", "images": [picture]})["error"]
    assert 400 <= error["statusCode"] < 500
    assert "edit" in error["message"]
    assert not engine.requests


def test_a_full_queue_is_tried_again(fake_server, engine):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=0.3)
    process = packages.start(SCRIPT, **arguments(fake_server, COMPATIBLE, {"maxRetries": 20}))
    wait_until(lambda: engine.requests)
    engine.refuse = None
    assert len(packages.answer(process)["images"]) == 1
    assert len(engine.requests) >= 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_abort_cancels_the_request(fake_server, engine, provider):
    engine.hold.set()
    process = packages.start(SCRIPT, **arguments(fake_server, provider, {}), abort=True)
    wait_until(lambda: engine.waiting == 1)
    assert packages.answer(process)["error"]["name"] == "AbortError"  # its stdin ends
    wait_until(lambda: engine.cancelled)
    assert engine.waiting == 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_it_sends_is_on_the_page(relayed, engine, page_bodies, provider):
    body = page_bodies[f"Vercel's ai, {provider}"]
    generate(relayed, provider, size=body["size"])
    assert relayed.bodies == [body]
