"""Paths, methods and keys as clients write them."""

import httpx
import openai
import pytest

from krea2_server.middleware.known_paths import known_path

BODY = {"prompt": "x", "size": "64x64", "seed": 7}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/images/generations/",
        "/images/generations",
        "//v1//images/generations",
        "/openai/v1/images/generations",
        "/openai/deployments/krea-2-turbo/images/generations?api-version=2025-04-01-preview",
    ],
)
def test_images_are_generated_under_each_of_these_paths(fake_server, engine, path):
    before = fake_server.metric("krea2_requests_total", outcome="done")
    usual = fake_server.post(**BODY).json()["data"]
    answer = httpx.post(fake_server.url + path, json=BODY, timeout=60)
    assert (answer.status_code, answer.json()["data"]) == (200, usual)
    assert fake_server.metric("krea2_requests_total", outcome="done") == before + 2


def test_azures_client_generates(fake_server, engine):
    client = openai.AzureOpenAI(
        azure_endpoint=fake_server.url, api_key="any", api_version="2025-04-01-preview"
    )
    with client:
        made = client.images.generate(model="krea-2-turbo", prompt="x", size="64x64", n=1)
        assert made.data[0].b64_json
        with pytest.raises(openai.NotFoundError, match="no-such-model"):
            client.images.generate(model="no-such-model", prompt="x", size="64x64")


def test_a_deployment_is_the_model_where_the_body_names_none(fake_server, engine):
    path = "/openai/deployments/no-such-model/images/generations"
    refused = httpx.post(fake_server.url + path, json=BODY, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/ping", "/metrics", "/v1/models", "/v1/queue", "/", "/openapi.json"],
)
def test_head_is_get_without_a_body(fake_server, engine, path):
    got, headed = fake_server.get(path), httpx.head(fake_server.url + path, timeout=60)
    assert (got.status_code, headed.status_code) == (200, 200)
    assert headed.headers["content-type"] == got.headers["content-type"]
    assert got.content
    assert not headed.content


def test_head_of_an_image_has_its_headers(fake_server, engine):
    url = fake_server.post(**BODY, response_format="url").json()["data"][0]["url"]
    got, headed = httpx.get(url, timeout=60), httpx.head(url, timeout=60)
    assert headed.status_code == 200
    assert not headed.content
    assert headed.headers["content-length"] == str(len(got.content))


def test_head_of_what_cannot_be_got_is_refused(fake_server, engine):
    assert httpx.head(fake_server.url + "/v1/images/generations", timeout=60).status_code == 405
    assert httpx.head(fake_server.url + "/nowhere", timeout=60).status_code == 404


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/chat/completions"])
def test_what_generates_no_images_says_what_does(fake_server, engine, path):
    answer = httpx.post(fake_server.url + path, json={"input": "a fox"}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_operation"
    assert "/v1/images/generations" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/", "/"),
        ("///", "/"),
        ("/v1/models/a/b", "/v1/models/a/b"),
        ("/models/krea", "/v1/models/krea"),
        ("/imagesque", "/imagesque"),
        ("/openai/deployments/x", "/deployments/x"),
        ("/v1/v1/models", "/v1/v1/models"),
    ],
)
def test_only_what_is_known_becomes_another_path(path, known):
    assert known_path(path)[0] == known
