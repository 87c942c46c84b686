"""Prompts and settings in images' files: only where asked for, and enough to ask again."""

import base64

import httpx
import pytest

from krea2_srt.images import FORMATS
from tests.infotexts import request_in, settings_in, text_in
from tests.server.serving import Served, serve

FIELDS = {"prompt": "a fox, at night: 狐\nin snow", "size": "64x48", "seed": 7}


def files(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


@pytest.fixture(scope="module")
def telling(shared_engine, tmp_path_factory) -> Served:
    """A server that embeds by default."""
    flags = ["--engine-endpoints", shared_engine.endpoint, "--default-embed-metadata"]
    with serve(tmp_path_factory.mktemp("telling"), *flags) as server:
        yield server


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_a_file_says_generates_it_again(fake_server, engine, output_format):
    how = {"output_format": output_format, "embed_metadata": True}
    raw = {"guidance_scale": 0.3, "negative_prompt": "blur", "num_inference_steps": 5}
    first, second = files(fake_server.post(**FIELDS, **raw, **how, n=2))
    assert request_in(second) == {**FIELDS, **raw, "seed": 8}
    assert settings_in(text_in(second))["Model"] == "krea-2-turbo"
    assert files(fake_server.post(**request_in(first), **how)) == [first]
    assert files(fake_server.post(**request_in(second), **how)) == [second]


@pytest.mark.parametrize("output_format", FORMATS)
def test_nobody_is_told_anything_unasked(fake_server, engine, output_format):
    how = {"output_format": output_format}
    (plain,) = files(fake_server.post(**FIELDS, **how))
    assert text_in(plain) is None
    assert files(fake_server.post(**FIELDS, **how, embed_metadata=False)) == [plain]


def test_the_settings_default_holds_where_a_request_says_nothing(telling, engine):
    (told,) = files(telling.post(**FIELDS))
    assert request_in(told)["prompt"] == FIELDS["prompt"]
    (plain,) = files(telling.post(**FIELDS, embed_metadata=False))
    assert text_in(plain) is None
    # Nobody has asked for metadata of this one, so it is no reason to refuse it.
    long = {**FIELDS, "prompt": "🦊" * 32_000, "output_format": "jpeg"}
    answer = telling.post(**long)
    assert text_in(files(answer)[0]) is None
    assert [text.partition(":")[0] for text in answer.json()["warnings"]] == ["embed_metadata"]


def test_a_prompt_that_a_jpeg_cannot_hold_is_refused_before_it_is_generated(fake_server, engine):
    long = {**FIELDS, "prompt": "🦊" * 32_000, "embed_metadata": True}
    refused = fake_server.post(**long, output_format="jpeg")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "embed_metadata"
    assert not engine.requests
    (held,) = files(fake_server.post(**long, output_format="png"))
    assert request_in(held)["prompt"] == long["prompt"]


def test_previews_have_none(fake_server, engine):
    engine.step_s = 0.001
    stream = fake_server.client().images.generate(
        prompt=FIELDS["prompt"],
        size=FIELDS["size"],
        stream=True,
        partial_images=2,
        extra_body={"embed_metadata": True, "seed": 7},
    )
    *partial, completed = [base64.b64decode(event.b64_json) for event in stream]
    assert len(partial) == 2
    assert [text_in(picture) for picture in partial] == [None, None]
    assert request_in(completed)["prompt"] == FIELDS["prompt"]


def test_a_stored_file_has_it_too(fake_server, engine):
    answer = fake_server.post(**FIELDS, response_format="url", embed_metadata=True)
    file = httpx.get(answer.json()["data"][0]["url"]).content
    assert request_in(file)["seed"] == 7


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_no_prompt_holds_nul(fake_server, engine, field):
    fields = {**FIELDS, "guidance_scale": 1, field: "a\0b"}
    refused = fake_server.post(**fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
