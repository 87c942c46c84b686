"""What /v1/models says is possible is accepted, and what lies beyond it is refused."""

from collections.abc import Iterator

import pytest

from krea2_server.api.quality import PRESETS
from tests.server.serving import Served, serve

KEYS = """
keys:
  - {name: plain, key: plain-0123456789-plain, requests_per_minute: 6000, max_concurrent: 9}
  - {name: low, key: low-0123456789-low-low, max_priority: -2, low_moderation: true}
"""
PLAIN = {"authorization": "Bearer plain-0123456789-plain"}
LOW = {"authorization": "Bearer low-0123456789-low-low"}
POLICY = """
checkers:
  - {type: openai-moderations, url: "http://127.0.0.1:9", categories: {nsfw: 0.5}}
on_error: allow
"""


@pytest.fixture(scope="module")
def limited(shared_engine, tmp_path_factory) -> Iterator[Served]:
    """A server with limits of its own, to the letter, so that nothing is rounded."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "keys.yaml").write_text(KEYS)
    (folder / "policy.yaml").write_text(POLICY)
    flags = ["--engine-endpoints", shared_engine.endpoint, "--accept", "openai"]
    flags += ["--api-keys-file", "keys.yaml", "--moderation-policy", "policy.yaml"]
    flags += ["--max-n", "3", "--max-prompt", "50", "--default-size", "64x96"]
    with serve(folder, *flags) as server:
        yield server


def said(server: Served, key: dict[str, str] | None = None, path: str = "/v1/models") -> dict:
    answer = server.get(path, headers=key).json()
    return (answer["data"][0] if path == "/v1/models" else answer)["krea2"]


def status(server: Served, key: dict[str, str] | None = None, **fields: object) -> int:
    return server.post(key, **{"prompt": "x", "size": "16x16", **fields}).status_code


def test_numbers_are_accepted_up_to_what_is_said_and_no_further(limited, engine):
    can = said(limited, PLAIN)
    assert can["max_n"] == 3
    for field, most, beyond in (
        ("n", can["max_n"], can["max_n"] + 1),
        ("prompt", "x" * can["max_prompt"], "x" * (can["max_prompt"] + 1)),
        ("num_inference_steps", can["max_steps"], can["max_steps"] + 1),
        ("guidance_scale", can["max_guidance"], can["max_guidance"] + 0.1),
        ("deadline_ms", can["max_deadline_ms"], can["max_deadline_ms"] + 1),
        ("priority", can["max_priority"], can["max_priority"] + 1),
        ("priority", can["min_priority"], can["min_priority"] - 1),
        ("size", f"16x{16 * can['max_aspect']}", f"16x{16 * (can['max_aspect'] + 1)}"),
        ("size", f"{can['size_multiple']}x16", f"{can['size_multiple'] + 1}x16"),
    ):
        assert status(limited, PLAIN, **{field: most}) == 200, field
        assert status(limited, PLAIN, **{field: beyond}) == 400, field
    stream = {"stream": can["stream"]}
    assert status(limited, PLAIN, **stream, partial_images=can["max_partial_images"]) == 200
    assert status(limited, PLAIN, **stream, partial_images=can["max_partial_images"] + 1) == 400


def test_pixels_are_accepted_up_to_what_is_said(limited, engine):
    engine.picture = b"a picture"
    can, step = said(limited, PLAIN), said(limited, PLAIN)["size_multiple"]
    side = int(can["max_pixels"] ** 0.5)
    assert side % step == 0
    assert status(limited, PLAIN, size=f"{side}x{side}") == 200
    assert status(limited, PLAIN, size=f"{side}x{side + step}") == 400
    across = can["max_pixels"] // can["max_side"] // step * step
    # Longer than the aspect allows as well, so that the side is what is looked at first.
    beyond = limited.post(PLAIN, prompt="x", size=f"{can['max_side'] + step}x{across}")
    assert f"between 16 and {can['max_side']}" in beyond.json()["error"]["message"]


def test_defaults_are_those_of_a_request_that_says_nothing(limited, engine):
    can = said(limited, PLAIN)
    answer = limited.post(PLAIN, prompt="x").json()
    assert answer["size"] == can["default_size"] == "64x96"
    assert answer["num_inference_steps"] == can["default_steps"]
    assert answer["guidance_scale"] == can["default_guidance"]
    assert can["default_response_format"] in answer["data"][0]
    assert can["default_embed_metadata"] is False


def test_qualities_are_what_they_are_said_to_be(limited, engine):
    engine.picture = b"a picture"
    can = said(limited, PLAIN)
    assert can["qualities"].keys() == PRESETS.keys()
    for name, stands_for in can["qualities"].items():
        answer = limited.post(PLAIN, prompt="x", quality=name, size="auto").json()
        assert {field: answer[field] for field in stands_for} == stands_for
    assert status(limited, PLAIN, quality="ultra") == 400


@pytest.mark.parametrize("field", ["output_format", "response_format"])
def test_formats_that_are_said_are_given(limited, engine, field):
    for name in said(limited, PLAIN)[f"{field}s"]:
        assert status(limited, PLAIN, **{field: name}) == 200
    assert status(limited, PLAIN, **{field: "gif"}) == 400


def test_rights_are_those_of_the_key_that_asks(limited, engine):
    plain, low = said(limited, PLAIN), said(limited, LOW, "/v1/models/krea-2-turbo")
    assert (plain["moderation"], low["moderation"]) == (["auto"], ["auto", "low"])
    assert (plain["max_priority"], low["max_priority"]) == (10, -2)
    assert (plain["requests_per_minute"], plain["max_concurrent"]) == (6000, 9)
    assert {"requests_per_minute", "max_concurrent"} & low.keys() == set()
    assert status(limited, PLAIN, moderation="low") == 403
    assert status(limited, LOW, moderation="low", priority=-2) == 200
    assert status(limited, LOW, priority=-1) == 403


def test_where_nothing_is_moderated_low_moderation_is_no_right(fake_server, engine):
    can = said(fake_server)
    assert can["moderation"] == ["auto", "low"]
    assert status(fake_server, moderation="low") == 200


def test_without_storage_there_are_no_urls(shared_engine, engine, tmp_path):
    with serve(tmp_path, "--engine-endpoints", engine.endpoint, "--storage", "none") as server:
        assert said(server)["response_formats"] == ["b64_json"]


def test_the_official_client_reads_it(limited):
    key = LOW["authorization"].removeprefix("Bearer ")
    (model,) = limited.client(api_key=key).models.list().data
    assert model.id == "krea-2-turbo"
    assert model.model_extra["krea2"]["max_n"] == 3
