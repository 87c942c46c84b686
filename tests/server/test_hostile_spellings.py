"""Whatever stands in the fields that other clients have: an answer that fits, and no bare 500."""

import random

import httpx
import pytest

from krea2_server.api.dialects import GUIDANCE_PLUS_ONE, NESTED, NO_EFFECT, SYNONYMS
from krea2_server.api.schemas import (
    UNSUPPORTED_FIELDS,
    ImageGenerationRequest,
    ImagesResponse,
)
from tests.server.serving import Served, serve
from tests.server.test_browsers_and_defaults import PATH
from tests.server.test_hostile_input import check_error, still_works

HOSTILE = [
    *(True, 0, -1, 1.5, 1e308, 10**30, 2**63, -(2**70)),
    *("\0", "\u202e", "x" * 10_000, "\uff11\uff12", "\u0663", "0x10", "1e999", "NaN", "--1", "1_0"),
    *(
        "../../etc/passwd",
        "%s%n",
        "'; --",
        "64x64x64",
        "1:0",
        "0:0",
        "99999999x1",
        "-5x-5",
        "\ufffe",
    ),
    *([], [[]], [1] * 1000, {}, {"width": "x"}, {"width": 1, "height": []}, {"$ne": 1}),
    *({"prompt": "y"}, {"messages": [[]]}, {"messages": {"content": 1}}, '{"a":', '["x"]', "null"),
]
NAMES = [*ImageGenerationRequest.model_fields, *SYNONYMS, *GUIDANCE_PLUS_ONE, *NO_EFFECT]
NAMES += ["resolution", *NESTED, *UNSUPPORTED_FIELDS]


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def check(response: httpx.Response) -> dict | None:
    """The error of what was refused, or None of what was done."""
    if response.status_code != 200:
        error = check_error(response)
        assert response.status_code == (404 if error["code"] == "model_not_found" else 400)
        return error
    if response.headers["content-type"].startswith("text/event-stream"):
        assert "event: image_generation.completed" in response.text
    else:
        ImagesResponse.model_validate_json(response.content)
    return None


@pytest.mark.parametrize(
    "part",
    [part if part < 2 else pytest.param(part, marks=pytest.mark.slow) for part in range(8)],
)
def test_any_value_of_any_known_name(fake_server, engine, part):
    base = {"prompt": "x", "size": "64x64", "n": 1}
    with httpx.Client(timeout=60) as client:
        for name in NAMES[part::8]:
            for value in HOSTILE:
                fields = {**base, name: value}
                error = check(client.post(fake_server.url + PATH, json=fields))
                if error is not None and error["param"] is not None:
                    # It, or what is in it, or what it contradicts.
                    field = error["param"].split(".")[0]
                    assert field in {name, *base, "width", "height", *field_names(value)}
    still_works(fake_server)


def field_names(value: object) -> set[str]:
    """The fields that a nested value brings along."""
    return set(value) if isinstance(value, dict) else set()


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_them(fake_server, engine, seed):
    draw = random.Random(seed)
    names = [*NAMES, *map(camel, NAMES), "no_such_field", "\0", "", "__class__", "prompt "]
    with httpx.Client(timeout=60) as client:
        for _ in range(150):
            chosen = draw.sample(names, draw.randint(1, 8))
            fields = {name: draw.choice([*HOSTILE, "x", "64x64", 1, "2"]) for name in chosen}
            check(client.post(fake_server.url + PATH, json={"prompt": "x", **fields}))
    still_works(fake_server)


ORIGIN = "https://pages.test"


@pytest.fixture(scope="module")
def with_origin(shared_engine, tmp_path_factory) -> Served:
    flags = ("--cors-origins", ORIGIN, "--engine-endpoints", shared_engine.endpoint)
    with serve(tmp_path_factory.mktemp("origins"), *flags) as running:
        yield running


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "", "*", "https://pages.test.evil.example", "https://evil.example/pages.test"),
        *(
            "http://pages.test",
            "https://pages.test:443",
            "HTTPS://PAGES.TEST",
            "https://pages.test/",
        ),
        *(
            "https://pages.test \xff",
            "https://\u0440ages.test",
            "x" * 20_000,
            "https://a@pages.test",
        ),
    ],
    ids=lambda origin: origin[:24],
)
def test_no_origin_but_the_named_one_may_read(with_origin, engine, origin):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x" * 999}
    sent = {b"origin": origin.encode()}
    for method, headers in (("OPTIONS", asked), ("GET", {}), ("POST", {})):
        path = PATH if method != "GET" else "/v1/models"
        body = {"prompt": "x", "size": "64x64"} if method == "POST" else None
        response = httpx.request(
            method,
            with_origin.url + path,
            json=body,
            headers={**{k.encode(): v.encode() for k, v in headers.items()}, **sent},
            timeout=60,
        )
        assert response.status_code < 500
        assert response.headers.get("access-control-allow-origin") != "*"
        assert response.headers.get("access-control-allow-origin") != origin
    still_works(with_origin)
