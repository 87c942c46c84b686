"""One picture of each of the clients of docs/clients.md, from the real engine."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from PIL import Image

from tests.channel import endpoints
from tests.engine_real.test_right_pictures import HEART, RIGHT
from tests.server.clients import packages
from tests.server.clients.pictures import from_base64, from_url
from tests.server.serving import Served, serve
from tools.demo_model.captions import caption
from tools.demo_model.judge import judge

pytestmark = pytest.mark.slow

PROMPT = caption(HEART, Random(1))
SIZE = "128x128"


@pytest.fixture(scope="module")
def url_server(server, tmp_path_factory) -> Served:
    """krea2-serve for clients that read URLs, on the engine of `server`."""
    (endpoint,) = endpoints(server.log)
    flags = ["--engine-endpoints", endpoint, "--default-response-format", "url"]
    flags += ["--served-model-name", "krea-2-turbo"]
    with serve(tmp_path_factory.mktemp("url-server"), *flags) as running:
        yield running


def with_openai_node(url: str) -> Image.Image:
    options = {"baseURL": url, "apiKey": "none"}
    request = {"prompt": PROMPT, "size": SIZE}
    found = packages.run("node/openai.mjs", options=options, request=request)
    return from_url(found["response"]["data"][0]["url"])


def with_vercel_ai(provider: str) -> Callable[[str], Image.Image]:
    def generate(url: str) -> Image.Image:
        arguments = {
            "provider": provider,
            "options": {"baseURL": url, "apiKey": "none", "name": "krea2"},
            "model": "krea-2-turbo",
            "request": {"prompt": PROMPT, "size": SIZE},
        }
        return from_base64(packages.run("node/vercel.mjs", **arguments)["images"][0]["base64"])

    return generate


def with_litellm(url: str) -> Image.Image:
    options = {"model": "openai/krea-2-turbo", "api_base": url, "api_key": "none"}
    found = packages.run("python/litellm_image.py", prompt=PROMPT, size=SIZE, **options)
    return from_url(found["data"][0]["url"])


def with_langchain(url: str) -> Image.Image:
    options = {"model": "krea-2-turbo", "size": SIZE, "base_url": url, "api_key": "none"}
    return from_url(
        packages.run("python/dalle_wrapper.py", options=options, prompt=PROMPT)["answer"]
    )


CLIENTS = {
    "openai-node": with_openai_node,
    "@ai-sdk/openai": with_vercel_ai("@ai-sdk/openai"),
    "@ai-sdk/openai-compatible": with_vercel_ai("@ai-sdk/openai-compatible"),
    "LiteLLM": with_litellm,
    "LangChain": with_langchain,
}


@pytest.mark.parametrize("generate", CLIENTS.values(), ids=CLIENTS)
def test_each_client_gets_the_picture_that_it_asks_for(url_server, generate):
    picture = generate(f"{url_server.url}/v1")
    assert judge(np.asarray(picture), HEART) == RIGHT
