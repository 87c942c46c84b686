"""Adapters over HTTP: how requests name them, who sees which, and what operators may do."""

import base64
import json

import httpx
import pytest

from krea2_srt.request import AdapterChoice
from krea2_srt.testing.fake_engine import ADAPTERS
from tests.infotexts import text_in
from tests.server.serving import Served, serve

OPERATOR, ACME, NOBODY = (f"sk-{name}-0123456789" for name in ("operator", "acme", "nobody"))
KEYS = f"""
keys:
  - {{name: operator, key: {OPERATOR}, admin: true}}
  - {{name: acme, key: {ACME}, adapters: ["acme/*"]}}
  - {{name: nobody, key: {NOBODY}, adapters: []}}
"""
SEPIA, INK = {"name": "sepia"}, {"name": "acme/ink"}


@pytest.fixture
def engine(engine):
    """The engine of all these servers, with adapters."""
    engine.adapters |= {info.name: info for info in ADAPTERS}
    return engine


@pytest.fixture(scope="module")
def with_keys(shared_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "keys.yaml").write_text(KEYS)
    flags = ["--api-keys-file", str(folder / "keys.yaml"), "--model-aliases", "dall-e-3,*"]
    with serve(folder, "--engine-endpoints", shared_engine.endpoint, *flags) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def command(server: Served, path: str, key: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=fields, headers=bearer(key), timeout=60)


def asked(engine) -> dict[str, float | None]:
    """The adapters of the last request."""
    return {choice.name: choice.scale for choice in engine.requests[-1].adapters}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora": [{"name": "sepia", "scale": 0.5}]}, {"sepia": 0.5}),
        ({"lora": [SEPIA, INK]}, {"sepia": None, "acme/ink": None}),
        ({"lora": "sepia"}, {"sepia": None}),
        ({"lora": "sepia:0.5, acme/ink"}, {"sepia": 0.5, "acme/ink": None}),
        ({"lora": {"sepia": 0.5, "acme/ink": "-1"}}, {"sepia": 0.5, "acme/ink": -1.0}),
        ({"loras": [{"path": "sepia.safetensors", "weight": "0.5"}]}, {"sepia": 0.5}),
        ({"image_loras": [{"path": "sepia", "scale": 2}]}, {"sepia": 2.0}),
        (
            {"lora": ["sepia:1", {"model": "acme/ink", "strength": 0.1}]},
            {"sepia": 1, "acme/ink": 0.1},
        ),
        ({"lora": []}, {}),
        ({"lora": None}, {}),
        ({"extra_body": {"lora": [SEPIA]}}, {"sepia": None}),
        ({"prompt": "a fox <lora:sepia:0.8>"}, {"sepia": 0.8}),
        ({"prompt": "a fox<lora:sepia>"}, {"sepia": None}),
        ({"prompt": "<LORA: sepia :.5:0.5>a fox", "lora": [INK]}, {"sepia": 0.5, "acme/ink": None}),
        ({"prompt": "a fox <lyco:sepia:1>"}, {"sepia": 1.0}),
        ({"model": "krea-2-turbo:sepia"}, {"sepia": None}),
        ({"model": "krea/Krea-2-Turbo:acme/ink"}, {"acme/ink": None}),
    ],
)
def test_a_request_names_adapters(fields, expected, fake_server, engine):
    response = fake_server.post(**{"prompt": "a fox", "size": "64x64", **fields})
    assert response.status_code == 200, response.text
    assert asked(engine) == expected
    assert engine.requests[-1].image.prompt == "a fox"
    assert {a["name"] for a in response.json().get("lora", [])} == set(expected)


def test_the_answer_says_name_scale_and_hash(fake_server, engine):
    body = fake_server.post(
        prompt="a fox", size="64x64", lora=[SEPIA, {"name": "acme/ink", "scale": 2}]
    )
    assert body.json()["lora"] == [
        {"name": "acme/ink", "scale": 2.0, "sha256": "a" * 64},
        {"name": "sepia", "scale": 0.8, "sha256": "5" * 64},
    ]
    assert "lora" not in fake_server.post(prompt="a fox", size="64x64").json()


def test_a_stream_says_so_too(fake_server, engine):
    with fake_server.client() as client:
        events = list(
            client.images.generate(
                prompt="a fox",
                size="64x64",
                stream=True,
                partial_images=1,
                extra_body={"lora": [SEPIA]},
            )
        )
    assert [event.type for event in events][-1] == "image_generation.completed"
    assert events[-1].to_dict()["lora"][0]["sha256"] == "5" * 64


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"lora": [{"name": "../x"}]}, "lora", "cannot be an adapter's name"),
        ({"lora": [{"name": "https://evil.example/x"}]}, "lora", "cannot be an adapter's name"),
        ({"lora": [SEPIA, SEPIA]}, "lora", "lora: sepia is asked for twice"),
        (
            {"lora": [SEPIA], "prompt": "a <lora:sepia:1>"},
            "prompt",
            "prompt: sepia is asked for twice",
        ),
        (
            {"lora": [{"name": "sepia", "scale": 99}]},
            "lora",
            "lora: the scale of sepia must be between",
        ),
        (
            {"lora": [{"name": "sepia", "rank": 8}]},
            "lora",
            "lora: 'rank' is not known; name and scale are",
        ),
        ({"lora": [{"scale": 1}]}, "lora", "lora: each adapter needs its name"),
        ({"lora": 7}, "lora", "lora: Input should be a valid list"),
        ({"lora": ["a", "b", "c", "d", "e"]}, "lora", "at most 4"),
        (
            {"lora": list("abcd"), "prompt": "x <lora:e:1>"},
            "prompt",
            "at most 4 adapters at a time",
        ),
        ({"prompt": "<lora:sepia:1>"}, "prompt", "prompt: must say what to generate"),
        ({"prompt": "a <lora:sepia:strong>"}, "prompt", "'<lora:sepia:strong>' cannot be read"),
        ({"prompt": "a <lora:sepia:1:0.5>"}, "prompt", "'<lora:sepia:1:0.5>' cannot be read"),
        ({"prompt": "a <lora:>"}, "prompt", "'' cannot be an adapter's name"),
        ({"prompt": "a <lora:\ud800:1>"}, "prompt", "prompt: Input should be a valid string"),
        (
            {"negative_prompt": "b <lora:sepia:1>", "guidance_scale": 1},
            "negative_prompt",
            "belongs into",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, param, message, fake_server, engine):
    body = json.dumps({"prompt": "a fox", "size": "64x64", **fields})
    response = httpx.post(
        f"{fake_server.url}/v1/images/generations",
        content=body,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert not engine.requests


def test_words_in_pointed_brackets_are_words(fake_server, engine):
    for prompt in ("a <b> fox < 3 hares", "lora: a name <3", "<loraline>"):
        assert fake_server.post(prompt=prompt, size="64x64").status_code == 200
        assert engine.requests[-1].image.prompt == prompt


@pytest.mark.parametrize(
    "tag",
    [
        "< lora:sepia:1>",
        "<lora :sepia:1>",
        "<lora:" + "x" * 301 + ":1>",
        "&lt;lora:sepia:1&gt;",
        "<lo<lora:sepia:1>ra:acme/ink>",
    ],
)
def test_what_looks_like_a_tag_is_not_taken_for_words(tag, fake_server, engine):
    for field in ("prompt", "negative_prompt"):
        fields = {"prompt": "a fox", "guidance_scale": 1.0, field: f"a fox {tag}"}
        response = fake_server.post(size="64x64", **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert not engine.requests


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("a fox <lora:sepia:1> in ink", "a fox in ink"),
        ("a fox<lora:sepia:1>, in ink", "a fox, in ink"),
        ("<lora:sepia:1> a fox\n<lora:acme/ink:1>\nin ink", "a fox\nin ink"),
    ],
)
def test_what_is_left_of_a_prompt_is_as_if_no_tag_had_been_there(prompt, left, fake_server, engine):
    assert fake_server.post(prompt=prompt, size="64x64").status_code == 200
    assert engine.requests[-1].image.prompt == left


def test_fields_that_name_different_adapters_are_refused(fake_server, engine):
    url = f"{fake_server.url}/sdapi/v1/txt2img"
    override = {"override_settings": {"sd_model_checkpoint": "krea-2-turbo:sepia"}}
    body = {"prompt": "a fox", "width": 64, "height": 64, **override}
    assert httpx.post(url, json={**body, "model": "krea-2-turbo"}, timeout=60).status_code == 200
    assert asked(engine) == {"sepia": None}, "the other field names none"
    refused = httpx.post(url, json={**body, "model": "krea-2-turbo:acme/ink"}, timeout=60)
    assert refused.status_code == 400
    assert "sepia" in refused.json()["error"]["message"]
    options = {"sd_model_checkpoint": "krea-2-turbo:sepia"}
    refused = httpx.post(f"{fake_server.url}/sdapi/v1/options", json=options, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "sd_model_checkpoint")


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        (
            {"lora": ["nope"]},
            400,
            "unknown_adapter",
            "lora: adapter 'nope' is not served here; acme/ink, sepia are",
        ),
        (
            {"prompt": "a <lora:nope:1>"},
            400,
            "unknown_adapter",
            "prompt: adapter 'nope' is not served here; acme/ink, sepia are",
        ),
        (
            {"model": "krea-2-turbo:nope"},
            404,
            "model_not_found",
            "model: adapter 'nope' is not served here; acme/ink, sepia are",
        ),
        (
            {"model": "dall-e-9:sepia"},
            404,
            "model_not_found",
            "model: 'dall-e-9:sepia' is not served here; krea-2-turbo is",
        ),
        ({"lora": ["broken"]}, 500, "adapter_failed", "adapter broken: there is no tensor in it"),
    ],
)
def test_one_that_is_not_there_is_told(fields, status, code, message, fake_server, engine):
    response = fake_server.post(**{"prompt": "a fox", "size": "64x64", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (status, code, message)
    assert response.headers.get("x-should-retry") != "true"


def test_without_any_that_is_said(fake_server, engine):
    engine.adapters.clear()
    error = fake_server.post(prompt="a fox", lora="sepia").json()["error"]
    assert error["message"] == "lora: adapter 'sepia' is not served here, nor is any other"
    assert fake_server.get("/v1/loras").json() == {"object": "list", "data": []}


def test_an_unknown_suffix_is_unknown_under_aliases_too(with_keys, engine):
    for model in ("dall-e-3:nope", "anything:nope", "krea-2-turbo:latest"):
        response = with_keys.post(bearer(OPERATOR), prompt="a fox", model=model)
        assert response.status_code == 404, model
    response = with_keys.post(
        bearer(OPERATOR), prompt="a fox", model="dall-e-3:sepia", size="64x64"
    )
    assert response.status_code == 200
    assert asked(engine) == {"sepia": None}


def test_what_is_served_is_listed(fake_server, engine):
    adapters = {one["name"]: one for one in fake_server.get("/v1/loras").json()["data"]}
    assert list(adapters) == ["acme/ink", "broken", "sepia"]
    assert adapters["sepia"] == {
        "name": "sepia",
        "title": "Everything in sepia",
        "trigger_words": ["sepia tones"],
        "default_scale": 0.8,
        "where": "device",
        "bytes": 500_000,
        "sha256": "5" * 64,
        "rank": 8,
        "error": None,
    }
    assert adapters["broken"]["error"] == "adapter broken: there is no tensor in it"
    assert adapters["broken"]["sha256"] is adapters["broken"]["rank"] is None


def test_adapters_are_models_of_a_parent(fake_server, engine):
    with fake_server.client() as client:
        models = {model.id: model for model in client.models.list()}
        assert set(models) == {"krea-2-turbo", "krea-2-turbo:acme/ink", "krea-2-turbo:sepia"}
        assert models["krea-2-turbo:sepia"].to_dict()["parent"] == "krea-2-turbo"
        assert "parent" not in models["krea-2-turbo"].to_dict()
        one = client.models.retrieve("krea-2-turbo:sepia").to_dict()
        assert (one["parent"], one["krea2"]["default_steps"]) == ("krea-2-turbo", 8)
    assert fake_server.get("/v1/models/krea-2-turbo:nope").status_code == 404


def test_a_key_sees_and_gets_its_own_alone(with_keys, engine):
    names = {}
    for key in (OPERATOR, ACME, NOBODY):
        data = with_keys.get("/v1/loras", headers=bearer(key)).json()["data"]
        names[key] = [one["name"] for one in data]
        models = with_keys.get("/v1/models", headers=bearer(key)).json()["data"]
        assert {m["id"] for m in models if "parent" in m} == {
            f"krea-2-turbo:{name}" for name in names[key] if name != "broken"
        }
    assert names == {OPERATOR: ["acme/ink", "broken", "sepia"], ACME: ["acme/ink"], NOBODY: []}
    assert with_keys.post(bearer(ACME), prompt="a fox", size="64x64", lora=[INK]).status_code == 200
    engine.requests.clear()
    for fields in ({"lora": [SEPIA]}, {"prompt": "a fox <lora:sepia:1>"}, {"model": "x:sepia"}):
        response = with_keys.post(bearer(ACME), **{"prompt": "a fox", "size": "64x64", **fields})
        missing = with_keys.post(
            bearer(ACME),
            **json.loads(
                json.dumps({"prompt": "a fox", "size": "64x64", **fields}).replace(
                    "sepia", "absent"
                )
            ),
        )
        assert response.status_code == missing.status_code
        assert response.text.replace("sepia", "absent") == missing.text, "its existence is a secret"
    assert not [one for one in engine.requests if AdapterChoice("sepia") in one.adapters]
    assert with_keys.get("/v1/models/krea-2-turbo:sepia", headers=bearer(ACME)).status_code == 404


def test_use_is_counted_by_key_and_adapter(with_keys, engine):
    labels = {"adapter": "acme/ink", "key": "acme"}
    before = with_keys.metric("krea2_adapter_images_total", **labels)
    with_keys.post(bearer(ACME), prompt="a fox", size="64x64", n=2, lora=[INK])
    assert with_keys.metric("krea2_adapter_images_total", **labels) == before + 2


def test_an_operator_loads_and_unloads(with_keys, engine):
    loaded = command(
        with_keys, "load_lora_adapter", OPERATOR, lora_name="new", lora_path="x/new.safetensors"
    )
    assert (loaded.status_code, loaded.json()["name"]) == (200, "new")
    assert (
        with_keys.post(bearer(OPERATOR), prompt="a fox", size="64x64", lora="new").status_code
        == 200
    )
    assert command(with_keys, "unload_lora_adapter", OPERATOR, lora_name="new").status_code == 200
    gone = command(with_keys, "unload_lora_adapter", OPERATOR, lora_name="new")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_adapter")


@pytest.mark.parametrize("path", ["load_lora_adapter", "unload_lora_adapter"])
def test_nobody_else_does(path, with_keys, fake_server, engine):
    refused = command(with_keys, path, ACME, lora_name="acme/ink")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
    assert command(fake_server, path, "any", lora_name="sepia").status_code == 403
    wrong = command(with_keys, path, OPERATOR, lora_name="../x")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "lora_name")
    assert set(engine.adapters) == {"acme/ink", "broken", "sepia"}


def test_the_file_says_which(fake_server, engine):
    body = fake_server.post(prompt="a fox <lora:sepia>", size="64x64", embed_metadata=True).json()
    text = text_in(base64.b64decode(body["data"][0]["b64_json"]))
    assert text.startswith("a fox <lora:sepia:0.8>\n"), "as front ends read it and send it again"
    assert f'Lora hashes: "sepia: {"5" * 12}"' in text
    assert 'Lora scales: "sepia: 0.8"' in text


def test_front_ends_of_a1111_name_and_list_them(fake_server, engine):
    listed = fake_server.get("/sdapi/v1/loras").json()
    assert [one["name"] for one in listed] == ["acme/ink", "sepia"]
    response = httpx.post(
        f"{fake_server.url}/sdapi/v1/txt2img",
        json={"prompt": "a fox <lora:sepia:0.5>", "width": 64, "height": 64},
        timeout=60,
    )
    assert response.status_code == 200
    assert asked(engine) == {"sepia": 0.5}
    assert response.json()["parameters"]["prompt"] == "a fox <lora:sepia:0.5>"
    assert "Lora hashes" in json.loads(response.json()["info"])["infotexts"][0]
    settings = {"override_settings": {"sd_model_checkpoint": "krea-2-turbo:nope"}}
    refused = httpx.post(f"{fake_server.url}/sdapi/v1/txt2img", json={"prompt": "x", **settings})
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "override_settings.sd_model_checkpoint"
