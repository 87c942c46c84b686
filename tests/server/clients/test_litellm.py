"""LiteLLM, unchanged: its proxy with the official client before it, and its function."""

import openai
import pytest

from krea2_srt.messages import EngineError
from tests.clients import openai_client
from tests.server.clients import packages
from tests.server.clients.litellm_proxy import KEY, LiteLlmProxy
from tests.server.clients.pictures import from_base64, from_url
from tests.server.clients.relay import relay

pytestmark = pytest.mark.slow

SMALL = {"model": "krea-2-turbo", "prompt": "a fox", "size": "64x64"}


@pytest.fixture(scope="module")
def wire(fake_server):
    with relay(fake_server.url) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(wire, tmp_path_factory):
    with LiteLlmProxy(tmp_path_factory.mktemp("litellm"), wire.url) as running:
        yield running


@pytest.fixture
def client(proxy, wire, engine):
    wire.bodies.clear()
    return openai_client(proxy.url, api_key=KEY)


def test_pictures_come_through_the_proxy(client, engine):
    response = client.images.generate(n=2, extra_body={"seed": 7}, **SMALL)
    pictures = [from_base64(image.b64_json) for image in response.data]
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [7, 8]
    assert response.usage.output_tokens == 2 * 16
    assert [request.image.num_images for request in engine.requests] == [2]


def test_the_proxy_keeps_a_response_format_to_itself(client, wire, engine):
    """Clients that always ask for base64 get it; what to do for URLs is on the page."""
    response = client.images.generate(response_format="b64_json", style="vivid", **SMALL)
    assert from_base64(response.data[0].b64_json).size == (64, 64)
    assert wire.bodies == [SMALL]


def test_urls_come_through_the_proxy(client, engine):
    """What stands in an extra_body is not held against LiteLLM's list of models."""
    fields = {"extra_body": {"response_format": "url"}}
    response = client.images.generate(extra_body=fields, **SMALL)
    assert from_url(response.data[0].url).size == (64, 64)


def test_our_own_fields_go_through_the_proxy(client, engine):
    fields = {"num_inference_steps": 3, "priority": 2}
    client.images.generate(quality="low", output_format="webp", extra_body=fields, **SMALL)
    (request,) = engine.requests
    assert (request.image.steps, request.priority, request.output_format) == (3, 2, "webp")


def test_mistakes_come_through_the_proxy_with_their_field(client, engine):
    with pytest.raises(openai.BadRequestError, match="size: must be ") as caught:
        client.images.generate(**{**SMALL, "size": "64y64"})
    assert caught.value.param == "size"


def test_a_full_queue_comes_through_the_proxy(client, engine):
    engine.refuse = EngineError("queue_full", "full", retry_after_s=0.1)
    with pytest.raises(openai.RateLimitError):
        client.images.generate(extra_body={"num_retries": 0}, **SMALL)


def test_what_the_proxy_sends_is_on_the_page(client, wire, page_bodies):
    body = page_bodies["LiteLLM, its proxy and its function"]
    client.images.generate(**body)
    assert wire.bodies == [body]


def test_its_function_sends_what_is_on_the_page(relayed, engine, page_bodies):
    body = page_bodies["LiteLLM, its proxy and its function"]
    own = {"model": f"openai/{body['model']}", "api_base": f"{relayed.url}/v1", "api_key": "none"}
    response = packages.run("python/litellm_image.py", **{**body, **own})
    (image,) = response["data"]
    assert from_base64(image["b64_json"]).size == (1024, 1024)
    assert relayed.bodies == [body]
