"""A1111's API on a server: what its front ends ask, one after the other, and what they must not."""

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.channel import wait_until
from tests.server.serving import Served, serve

API = "/sdapi/v1"
BODY = {"prompt": "a fox", "width": 64, "height": 96, "seed": 7, "steps": 4}
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
KEYS = f"""
keys:
  - {{name: alice, key: {ALICE}}}
  - {{name: bob, key: {BOB}, max_concurrent: 1, max_priority: 0}}
"""
SLOW_S = 30.0
"""Time of a step behind which a request stays until it is ended."""


def basic(text: str) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def post(server: Served, path: str, body: object = None, **options) -> httpx.Response:
    return httpx.post(f"{server.url}{API}/{path}", json=body, timeout=60, **options)


def get(server: Served, path: str, **options) -> httpx.Response:
    return server.get(f"{API}/{path}", **options)


def check_error(response: httpx.Response, status: int, param: str | None = None) -> dict:
    """An error that both kinds of clients can read."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["detail"] == answer["errors"] == answer["error"]["message"]
    assert answer["error"]["param"] == param
    assert "Traceback" not in response.text
    return answer["error"]


@pytest.fixture(scope="module")
def guarded(shared_engine, tmp_path_factory) -> Iterator[Served]:
    """A server with two keys."""
    folder = tmp_path_factory.mktemp("a1111")
    (folder / "keys.yaml").write_text(KEYS)
    with serve(
        folder, "--api-keys-file", "keys.yaml", "--engine-endpoints", shared_engine.endpoint
    ) as server:
        yield server


@pytest.fixture
def sender() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def start(sender, server: Served, **options) -> "Future[httpx.Response]":
    return sender.submit(post, server, "txt2img", BODY, **options)


def test_the_pictures_are_those_of_the_images_api(fake_server, engine):
    done = fake_server.metric("krea2_requests_total", outcome="done")
    made = post(fake_server, "txt2img", {**BODY, "batch_size": 2, "n_iter": 2}).json()
    same = fake_server.post(
        prompt="a fox", size="64x96", seed=7, num_inference_steps=4, n=4, output_format="png"
    ).json()
    assert made["images"] == [image["b64_json"] for image in same["data"]]
    ours, theirs = (request.image for request in engine.requests)
    assert ours == theirs
    assert fake_server.metric("krea2_requests_total", outcome="done") == done + 2


def test_an_answer_says_what_was_made(fake_server, engine):
    made = post(fake_server, "txt2img", {**BODY, "n_iter": 2, "save_images": True}).json()
    assert made.keys() == {"images", "parameters", "info", "warnings"}
    assert base64.b64decode(made["images"][0]).startswith(b"\x89PNG")
    info = json.loads(made["info"])
    assert (info["seed"], info["all_seeds"]) == (7, [7, 8])
    assert (info["width"], info["height"], info["steps"]) == (64, 96, 4)
    assert [text.split("\n")[0] for text in info["infotexts"]] == ["a fox"] * 2
    for text, seed in zip(info["infotexts"], (7, 8), strict=True):
        settings = text.split("\n")[-1].split(", ")
        assert {"Steps: 4", "CFG scale: 1", f"Seed: {seed}", "Size: 64x96"} < set(settings)
    assert made["parameters"] | BODY == made["parameters"]
    assert made["warnings"] == info["warnings"]
    assert [warning.split(":")[0] for warning in made["warnings"]] == ["save_images"]


def test_credentials_in_a_body_are_not_sent_back(fake_server, engine):
    """SillyTavern sends its own request on, and its server's address and password in it."""
    answer = post(fake_server, "txt2img", {**BODY, "url": "http://x", "auth": "any:secret"})
    assert answer.status_code == 200
    assert "secret" not in answer.text
    assert "secret" not in fake_server.log


def test_images_that_nobody_wants_to_see_are_not_sent(fake_server, engine):
    made = post(fake_server, "txt2img", {**BODY, "send_images": False}).json()
    assert made["images"] == []
    assert json.loads(made["info"])["all_seeds"] == [7]
    assert [warning.split(":")[0] for warning in made["warnings"]] == ["send_images"]


def test_a_front_end_connects_and_fills_its_menus(fake_server, engine):
    """In SillyTavern's order; what it takes of each is in its stable-diffusion.js, 02903fd."""
    name = get(fake_server, "options").json()["sd_model_checkpoint"]
    assert name in [model["title"] for model in get(fake_server, "sd-models").json()]
    assert [one["name"] for one in get(fake_server, "samplers").json()] == ["Euler"]
    assert [one["name"] for one in get(fake_server, "schedulers").json()] == ["automatic"]
    assert get(fake_server, "upscalers").json()[0]["name"] == "None"
    for empty in ("latent-upscale-modes", "sd-vae", "sd-modules", "loras", "prompt-styles"):
        assert get(fake_server, empty).json() == []
    assert get(fake_server, "embeddings").json() == {"loaded": {}, "skipped": {}}
    assert get(fake_server, "cmd-flags").json() == {}
    assert post(fake_server, "options", {"sd_model_checkpoint": name}).json() == {}
    progress = get(fake_server, "progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)
    chosen = {"sampler_name": "Euler", "scheduler": "automatic"}
    overrides = {"override_settings": {"sd_model_checkpoint": name}}
    assert "warnings" not in post(fake_server, "txt2img", {**BODY, **chosen, **overrides}).json()


def test_options_are_sent_back_unchanged_and_no_other_model_is_taken(fake_server, engine):
    options = get(fake_server, "options").json()
    assert post(fake_server, "options", options).json() == {}
    changed = post(fake_server, "options", {**options, "samples_format": "jpg", "x": 1}).json()
    assert [text.split(":")[0] for text in changed["warnings"]] == ["samples_format", "x"]
    for name in ("dreamshaper_8.safetensors [879db523c3]", "\ud800", "x" * 10_000):
        body = json.dumps({"sd_model_checkpoint": name})
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{fake_server.url}{API}/options", content=body, headers=headers)
        assert check_error(answer, 404, "sd_model_checkpoint")["code"] == "model_not_found"
    overrides = {"override_settings": {"sd_model_checkpoint": "sdxl"}}
    answer = post(fake_server, "txt2img", {**BODY, **overrides})
    check_error(answer, 404, "override_settings.sd_model_checkpoint")
    assert not engine.requests


@pytest.mark.parametrize("path", ["img2img", "extra-single-image", "interrogate"])
def test_input_images_are_refused_whatever_their_size(fake_server, engine, path):
    answer = post(fake_server, path, {"init_images": ["x" * 3_000_000], "prompt": "a fox"})
    assert check_error(answer, 400)["code"] == "unsupported_operation"
    assert "not served yet" in answer.json()["detail"]


def test_progress_is_that_of_the_steps_and_an_interrupt_ends_them(fake_server, engine, sender):
    engine.step_s = SLOW_S
    waiting = start(sender, fake_server)
    wait_until(lambda: get(fake_server, "progress").json()["progress"] == 0.25)
    state = get(fake_server, "progress?skip_current_image=true").json()
    assert (state["state"]["sampling_step"], state["state"]["sampling_steps"]) == (1, 4)
    assert (state["state"]["job_count"], state["state"]["job"]) == (1, "txt2img")
    assert (state["current_image"], state["eta_relative"]) == (None, 0.0)
    assert "a fox" not in json.dumps(state)
    assert post(fake_server, "interrupt").json() == {}
    assert check_error(waiting.result(), 499)["code"] == "cancelled"
    wait_until(lambda: engine.cancelled)
    assert get(fake_server, "progress").json()["state"]["job_count"] == 0
    assert post(fake_server, "interrupt").json() == {}


def test_keys_neither_see_nor_interrupt_each_other(guarded, engine, sender):
    engine.step_s = SLOW_S
    hers = start(sender, guarded, headers=basic(f"any:{ALICE}"))
    his = start(sender, guarded, headers={"authorization": f"Bearer {BOB}"})
    wait_until(lambda: engine.waiting == 2)

    def jobs(key: str) -> int:
        answer = get(guarded, "progress", headers=basic(f"any:{key}")).json()
        return answer["state"]["job_count"]

    assert (jobs(ALICE), jobs(BOB)) == (1, 1)
    post(guarded, "interrupt", headers=basic(BOB))
    assert his.result().status_code == 499
    assert (jobs(ALICE), jobs(BOB)) == (1, 0)
    assert not hers.done()
    assert len(engine.cancelled) == 1
    post(guarded, "interrupt", headers=basic(f"{ALICE}:"))
    assert hers.result().status_code == 499


def test_a_keys_limits_and_rights_hold(guarded, engine, sender):
    bob = {"authorization": f"Bearer {BOB}"}
    refused = post(guarded, "txt2img", {**BODY, "priority": 5}, headers=bob)
    assert check_error(refused, 403, "priority")["code"] == "not_allowed"
    engine.hold.set()
    first = start(sender, guarded, headers=bob)
    wait_until(lambda: engine.waiting == 1)
    refused = post(guarded, "txt2img", BODY, headers=bob)
    assert check_error(refused, 429)["code"] == "concurrency_limit"
    assert refused.headers["x-should-retry"] == "true"
    engine.hold.clear()
    assert first.result().status_code == 200


@pytest.mark.parametrize("site", [None, "cross-site", "same-site", "none"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", ""])
def test_a_page_of_another_origin_cannot_interrupt(fake_server, site, origin):
    """Browsers say where a request comes from only to https and to the local host."""
    headers = {"origin": origin} | ({"sec-fetch-site": site} if site else {})
    error = check_error(post(fake_server, "interrupt", headers=headers), 403)
    assert error["code"] == "cross_origin"


def test_a_page_without_an_origin_cannot_interrupt_from_elsewhere(fake_server):
    for site in ("cross-site", "same-site"):
        check_error(post(fake_server, "interrupt", headers={"sec-fetch-site": site}), 403)


@pytest.mark.parametrize("host", ["192.168.1.5:30000", "images.example", "[fe80::1]:30000"])
def test_a_page_of_our_own_and_what_is_no_page_can_interrupt(fake_server, host):
    evil = {"host": host, "origin": "http://evil.example"}
    check_error(post(fake_server, "interrupt", headers=evil), 403)
    for scheme in ("http", "https"):
        own = {"host": host, "origin": f"{scheme}://{host}"}
        assert post(fake_server, "interrupt", headers=own).status_code == 200
    assert post(fake_server, "interrupt", headers={"host": host}).status_code == 200


DEPTHS = range(950, 970)
"""From what can be read and shown to what Python's JSON does not follow."""


@pytest.mark.parametrize(
    ("path", "start", "end"),
    [
        ("txt2img", '{"prompt": "x", "n_iter": ', "}"),
        ("txt2img", '{"prompt": "x", "send_images": ', "}"),
        ("txt2img", '{"prompt": "x", "override_settings": {"sd_model_checkpoint": ', "}}"),
        ("options", '{"sd_model_checkpoint": ', "}"),
    ],
)
def test_no_depth_is_a_failure_of_ours(fake_server, engine, path, start, end):
    with httpx.Client(headers={"content-type": "application/json"}, timeout=60) as client:
        for depth in DEPTHS:
            content = start + '{"a":' * depth + "1" + "}" * depth + end
            answer = client.post(f"{fake_server.url}{API}/{path}", content=content)
            assert answer.status_code == 400, (depth, answer.text)
    assert not engine.requests


def test_a_prompt_that_was_cut_is_named(fake_server, engine):
    made = post(fake_server, "txt2img", {**BODY, "prompt": "fox " * 2000}).json()
    assert [text.split(":")[0] for text in made["warnings"]] == ["prompt"]
    assert json.loads(made["info"])["warnings"] == made["warnings"]


def test_requests_of_the_images_api_are_not_interrupted(fake_server, engine, sender):
    engine.hold.set()
    other = sender.submit(fake_server.post, prompt="x", size="64x64")
    wait_until(lambda: engine.waiting == 1)
    post(fake_server, "interrupt")
    engine.hold.clear()
    assert other.result().status_code == 200


def test_to_hang_up_cancels(fake_server, engine):
    engine.step_s = SLOW_S
    body = json.dumps(BODY).encode()
    head = f"POST {API}/txt2img HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", fake_server.port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.waiting == 1)
    wait_until(lambda: len(engine.cancelled) == 1)
    wait_until(lambda: not get(fake_server, "progress").json()["state"]["job_count"])


@pytest.mark.parametrize(
    "headers",
    [
        basic(f"any:{ALICE}"),
        basic(f"{ALICE}:"),
        basic(ALICE),
        basic(f"{ALICE}:any"),
        {"authorization": f"Bearer {ALICE}"},
        {"x-api-key": ALICE},
    ],
    ids=["password", "user", "user alone", "user with any password", "bearer", "x-api-key"],
)
def test_a_key_may_come_in_each_of_these_ways(guarded, engine, headers):
    assert post(guarded, "txt2img", BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Basic",
        "Basic =",
        "Basic %%%",
        "Basic " + base64.b64encode(b":").decode(),
        "Basic " + base64.b64encode(b"\xff\xfe:\x00").decode(),
        "Basic " + base64.b64encode(b"a:b").decode(),
        "Basic " + "QUFB" * 5000,
        f"Digest {ALICE}",
        f"Basic {ALICE}",
    ],
)
def test_nothing_else_is_a_key(guarded, engine, header):
    headers = {} if header is None else {"authorization": header}
    refused = post(guarded, "txt2img", BODY, headers=headers)
    assert check_error(refused, 401)["type"] == "authentication_error"
    assert refused.headers["www-authenticate"].startswith("Basic ")
    assert not engine.requests


@pytest.mark.parametrize("path", ["img2img", "interrupt", "options", "nowhere", "/progress"])
def test_nothing_is_open_without_a_key(guarded, engine, path):
    check_error(post(guarded, path, BODY), 401)


def test_basic_is_read_on_these_paths_only(guarded, engine):
    refused = guarded.post(basic(f"any:{ALICE}"), prompt="x", size="64x64")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_no_key_is_in_the_log(guarded, engine):
    post(guarded, "txt2img", BODY, headers=basic(f"any:{ALICE}"))
    for secret in (ALICE, basic(f"any:{ALICE}")["authorization"].split()[1]):
        assert secret not in guarded.log


HOSTILE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    b'{"prompt": "x", "batch_size": ' + b"9" * 4000 + b"}",
    b'{"prompt": "x", "subseed_strength": NaN}',
    b'{"prompt": "x", "cfg_scale": NaN, "steps": Infinity}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "<lora:\\ud800:1>"}',
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "x", "width": "wide", "height": []}',
    b'{"prompt": "x", "width": 1e300, "height": 64}',
    b'{"prompt": "x", "init_images": ["not base64 \\u0000"]}',
    b'{"prompt": "x", "alwayson_scripts": {"\\ud800": [1]}}',
    b'{"prompt": "x", "override_settings": "x"}',
    b'{"prompt": "x", "override_settings": {"samples_format": "gif"}}',
    b'{"prompt": "x", "override_settings": {"samples_format": {"a": 1}}}',
    b'{"prompt": "x", "override_settings": {"samples_format": "jpg", "jpeg_quality": "best"}}',
    b'{"prompt": "x", "override_settings": {"sd_model_checkpoint": ["x"]}}',
    b'{"prompt": "x", "sampler_name": {"a": [1]}, "scheduler": 5, "steps": -1}',
    b'{"\\ud800": 1}',
]


@pytest.mark.parametrize("content", HOSTILE, ids=lambda content: content[:60].decode("latin-1"))
def test_whatever_is_sent_gets_an_error_that_says_why(fake_server, engine, content):
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        f"{fake_server.url}{API}/txt2img", content=content, headers=headers, timeout=60
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    assert not engine.requests


def test_names_that_are_no_text_are_named_all_the_same(fake_server, engine):
    content = b'{"prompt": "x", "width": 64, "height": 64, "override_settings": {"\\ud800": 1}, '
    content += b'"extra": {"\\ud800": 1}, "sampler_name": "\\ud800"}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        f"{fake_server.url}{API}/txt2img", content=content, headers=headers, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["warnings"]) == 3


def test_errors_of_the_engine_and_of_paths_can_be_read_too(fake_server, engine):
    check_error(post(fake_server, "txt2img", {**BODY, "width": 10**6}), 400, "width")
    check_error(get(fake_server, "txt2img"), 405)
    check_error(get(fake_server, "nowhere"), 404)
    too_large = {"prompt": "x" * 2_000_000}
    check_error(post(fake_server, "txt2img", too_large), 413)
    assert httpx.head(f"{fake_server.url}{API}/options").status_code == 200
