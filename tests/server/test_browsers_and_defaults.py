"""What a server adds to requests, and pages of other origins that ask it."""

from collections.abc import Iterator

import httpx
import pytest

from tests.server.serving import Served, serve

PATH = "/v1/images/generations"
ORIGIN = "https://pages.test"
FLAGS = (
    *("--cors-origins", ORIGIN, "--api-keys", "a-key-of-sixteen-signs", "--model-aliases", "*"),
    *("--default-size", "64x96", "--default-response-format", "url"),
)
KEY = {"authorization": "Bearer a-key-of-sixteen-signs"}


@pytest.fixture(scope="module")
def server(shared_engine, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("defaults")
    with serve(folder, "--engine-endpoints", shared_engine.endpoint, *FLAGS) as running:
        yield running


def test_a_page_of_a_known_origin_may_ask(server, engine):
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    wanted = {**asked, "access-control-request-headers": "authorization,content-type"}
    preflight = httpx.options(server.url + PATH, headers=wanted)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = server.post({**KEY, "origin": ORIGIN}, prompt="x")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    # A refusal can be read too.
    refused = server.post({"origin": ORIGIN}, prompt="x")
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("name", ["api-key", "x-api-key"])
def test_a_key_may_come_as_azures_clients_send_it(server, engine, name):
    key = KEY["authorization"].removeprefix("Bearer ")
    assert server.post({name: key}, prompt="x").status_code == 200
    refused = server.post({name: key + "x"}, prompt="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_page_of_another_origin_may_not(server, engine):
    headers = {"origin": "https://other.test", "access-control-request-method": "POST"}
    preflight = httpx.options(server.url + PATH, headers=headers)
    assert "access-control-allow-origin" not in preflight.headers


def test_a_request_gets_the_servers_defaults(server, engine):
    answer = server.post(KEY, prompt="x", model="whatever").json()
    assert answer["size"] == "64x96"
    assert answer["data"][0]["url"].startswith("http")
    other = server.post(KEY, prompt="x", size="64x64", response_format="b64_json").json()
    assert (other["size"], other["data"][0].get("url")) == ("64x64", None)


def test_any_name_is_served_but_none_with_a_colon_and_none_is_listed(server, engine):
    refused = server.post(KEY, prompt="x", model="whatever:adapter")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    listed = server.get("/v1/models", headers=KEY).json()["data"]
    assert "*" not in [model["id"] for model in listed]
