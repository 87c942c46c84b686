"""Bodies of txt2img as the request that they stand for, and how far requests are."""

import asyncio
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from krea2_server.a1111.answers import txt2img_answer
from krea2_server.a1111.fields import ASK_NOTHING, NO_EFFECT, REFUSED
from krea2_server.a1111.reading import read_txt2img
from krea2_server.a1111.running import RunningRequests
from krea2_server.api.images import resolve_asked
from krea2_server.api.lenient import request_model
from krea2_server.api.parameters import resolve
from krea2_server.app import as_api_error, create_app
from krea2_server.errors import ApiError
from krea2_server.keys import Keys
from krea2_server.services import Services
from krea2_server.settings import Settings
from krea2_srt.messages import Generated, GenerateRequest, ProgressUpdate
from krea2_srt.request import AdapterChoice, ImageRequest
from krea2_srt.testing.fake_engine import MODEL
from tests.unit.server.test_dialects import RAW, canonical

PAGE = (Path(__file__).parents[3] / "docs/clients.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| ([^|`]+) \| `(\{.*\})` \| ([^|]+) \|$", PAGE, re.MULTILINE)


def read(model=MODEL, **fields) -> tuple[GenerateRequest, list[str]]:
    """A body with a prompt as it reaches the engine, and what the client is told."""
    asked = read_txt2img({"prompt": "a fox", **fields}, max_n=10)
    message = resolve(asked.request, "id", model, max_n=10, max_prompt=32_000)
    return message, asked.request.warnings


def named(**fields) -> list[str]:
    return [warning.split(":")[0] for warning in read(**fields)[1]]


def refused(**fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(("client", "version", "body", "answer"), ROWS, ids=[r[0] for r in ROWS])
def test_a_front_ends_body_gets_what_the_page_says(client, version, body, answer):
    kind, *_ = answer.split()
    fields = re.findall(r"`([\w.]+)`", answer)
    if kind == "refuses":
        assert refused(**json.loads(body)).param == fields[0]
        return
    assert sorted(named(**json.loads(body))) == sorted(fields)
    assert kind == ("names" if fields else "image")


def test_the_page_has_rows_of_several_front_ends():
    assert len(ROWS) >= 7


def test_what_both_apis_know_is_the_same_request():
    message, warnings = read(
        negative_prompt="", seed=7, steps=4, width=64, height=96, batch_size=2, n_iter=3
    )
    assert message == canonical(seed=7, num_inference_steps=4, size="64x96", n=6)
    assert warnings == []


def test_cfg_scale_is_guidance_plus_one_and_off_on_a_distilled_model():
    assert read(model=RAW, cfg_scale=4.5)[0].image.guidance == 3.5
    assert read(model=RAW, cfg_scale=1)[0].image.guidance == 0.0
    message, warnings = read(cfg_scale=7)
    assert message.image.guidance == 0.0
    assert [warning.split(":")[0] for warning in warnings] == ["cfg_scale"]


def test_a_format_may_be_the_options_of_the_webui():
    message, warnings = read(override_settings={"samples_format": "jpg", "jpeg_quality": 80})
    assert (message.output_format, message.quality, warnings) == ("jpeg", 80, [])
    message, warnings = read(override_settings={"samples_format": "png", "jpeg_quality": 80})
    assert (message.output_format, message.quality, warnings) == ("png", 100, [])


def test_deadlines_and_priorities_are_those_of_every_request():
    message, _ = read(deadline_ms=1500, priority=-1)
    assert (message.deadline_s, message.priority) == (1.5, -1)


ASKED = {
    "enable_hr": True,
    "init_images": ["aGVsbG8="],
    "mask": "aGVsbG8=",
    "alwayson_scripts": {"ADetailer": {"args": [True, True, {"ad_model": "face_yolov8n.pt"}]}},
    "script_name": "X/Y/Z plot",
    "subseed_strength": 0.1,
    "seed_resize_from_w": 512,
    "refiner_checkpoint": "sd_xl_refiner_1.0",
    "stream": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_the_point_of_a_request_is_refused_by_its_name(name):
    error = refused(**{name: ASKED.get(name, ["something"])})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    for nothing in (None, "", []):
        assert named(**{name: nothing}) == []


@pytest.mark.parametrize(
    "scripts",
    [
        {},
        {"ControlNet": {"args": []}},
        {"ControlNet": {"args": [{"enabled": False, "model": "x"}]}},
        {"ADetailer": {"args": [False, False, {"ad_model": "None"}]}},
        {"Reactor": {}},
    ],
)
def test_extensions_that_are_switched_off_ask_for_nothing(scripts):
    assert read(seed=7, alwayson_scripts=scripts) == read(seed=7)


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_has_no_effect_is_named_and_its_defaults_are_not(name):
    assert named(**{name: ["something"]}) == [name]
    for value in NO_EFFECT[name].silent:
        assert named(**{name: value}) == []


@pytest.mark.parametrize("name", sorted(ASK_NOTHING))
def test_what_depends_on_something_else_asks_for_nothing(name):
    assert named(**{name: "something"}) == []


def test_what_nobody_knows_is_named_as_the_webui_would_pass_over_it():
    assert named(flux_capacitor=1) == ["flux_capacitor"]
    assert named(override_settings={"flux": 1, "sd_vae": "x"}) == [
        "override_settings.flux",
        "override_settings.sd_vae",
    ]


def test_a_prompt_may_ask_for_an_adapter_and_not_for_a_hypernetwork():
    message, warnings = read(prompt="a fox <lora:detail:0.8>")
    assert (message.image.prompt, warnings) == ("a fox", [])
    assert message.adapters == {AdapterChoice("detail", 0.8)}
    assert read(lora=["detail:0.8"])[0].adapters == message.adapters
    assert refused(prompt="a fox <hypernet:x:1>").code == "unsupported_value"
    assert refused(negative_prompt="<hypernet:x:1>").param == "negative_prompt"


def test_weights_in_a_prompt_are_read_as_text_and_named():
    message, warnings = read(prompt="a (red:1.3) fox")
    assert message.image.prompt == "a (red:1.3) fox"
    assert [warning.split(":")[0] for warning in warnings] == ["prompt"]
    assert "(red:1.3)" in warnings[0]
    assert named(prompt="a fox (at noon) in a wood: dusk [sic]") == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 10**400}, "batch_size"),
        ({"n_iter": 1.5}, "n_iter"),
        ({"n_iter": True}, "n_iter"),
        ({"batch_size": 4, "n_iter": 4}, "n_iter"),
        ({"send_images": "maybe"}, "send_images"),
        ({"override_settings": [1]}, "override_settings"),
        (
            {"override_settings": {"sd_model_checkpoint": 5}},
            "override_settings.sd_model_checkpoint",
        ),
        ({"alwayson_scripts": 5}, "alwayson_scripts"),
        ({"width": 64}, "height"),
        ({"width": 10**9, "height": 64}, "width"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(fields, param):
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    "fields", [{"steps": "many"}, {"seed": -2}, {"prompt": ["a"]}, {"width": {}}]
)
def test_what_our_request_refuses_is_refused_by_the_same_check(fields):
    with pytest.raises((RequestValidationError, ApiError)):
        read(**fields)


@pytest.mark.parametrize("field", ["prompt", "Prompt", "positive_prompt", "negative", "negPrompt"])
@pytest.mark.parametrize("nested", [None, "extra", "parameters"])
def test_a_hypernetwork_is_seen_whatever_its_prompt_is_called(field, nested):
    values = {field: "a fox <hypernet:x:1>"}
    if "neg" in field:
        values["prompt"] = "a fox"
    with pytest.raises(ApiError) as caught:
        read_txt2img({nested: values} if nested else values, max_n=10)
    assert (caught.value.status, caught.value.param) == (400, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("initImages", ["aGVsbG8="]), ("enableHr", True), ("subseedStrength", 0.5), ("Stream", True)],
)
def test_what_is_refused_is_refused_in_every_spelling_and_place(field, value):
    for fields in (
        {field: value},
        {"extra": {field: value}},
        {"kwargs": json.dumps({field: value})},
    ):
        error = refused(**fields)
        assert (error.param, error.code) == (field, "unsupported_parameter")


def test_what_is_nested_is_read_by_the_same_tables():
    message, warnings = read(extra={"partialImages": 3, "responseFormat": "url", "styles": ["x"]})
    assert (message.previews, message.progress) == (0, False)
    assert sorted(warning.split(":")[0] for warning in warnings) == [
        "partialImages",
        "responseFormat",
        "styles",
    ]
    assert read(seed=7, extra={"subseed": 3, "firstphaseWidth": 0}) == read(seed=7)
    assert refused(parameters={"extra": {"enable_hr": True}}).param == "extra"


def test_fields_of_this_api_may_be_spelled_otherwise_too():
    expected = read(seed=7, batch_size=2, n_iter=3)
    assert read(seed=7, batchSize=2, extra={"nIter": 3}) == expected
    assert expected[0].image.num_images == 6
    asked = read_txt2img(
        {
            "prompt": "a fox",
            "sendImages": False,
            "overrideSettings": {"sd_model_checkpoint": "mine", "samples_format": "webp"},
        },
        max_n=10,
    )
    assert (asked.send_images, asked.checkpoint) == (False, "mine")
    assert asked.request.output_format == "webp"


def test_a_number_as_text_asks_for_no_more_than_the_number():
    assert named(subseed_strength="0", seed_resize_from_w="-1") == []


def test_the_quality_of_the_webui_is_that_of_whatever_format_was_asked_for():
    message, warnings = read(output_format="webp", override_settings={"jpeg_quality": 80})
    assert (message.output_format, message.quality, warnings) == ("webp", 80, [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"output_format": "webp", "override_settings": {"samples_format": "jpg"}},
            "override_settings.samples_format",
        ),
        (
            {
                "format": "jpg",
                "output_compression": 60,
                "override_settings": {"jpeg_quality": 80},
            },
            "override_settings.jpeg_quality",
        ),
        ({"n": 3, "n_iter": 2}, "n_iter"),
        ({"num_images": 3, "batchSize": 2}, "batchSize"),
        ({"n": 3, "batch_size": 2, "n_iter": 2}, "n_iter"),
        ({"n_iter": 3, "nIter": 2}, "nIter"),
        ({"send_images": True, "extra": {"sendImages": False}}, "sendImages"),
    ],
)
def test_two_fields_that_contradict_each_other_are_refused(fields, param):
    error = refused(**fields)
    assert error.param == param
    assert error.message.startswith(f"{param}: ") or "batch_size times" in error.message


def test_fields_that_say_the_same_twice_are_read():
    overrides = {"samples_format": "jpg", "jpeg_quality": 80}
    message, _ = read(
        output_format="jpeg", override_settings=overrides, n=4, n_iter=2, batch_size=2
    )
    assert (message.output_format, message.quality, message.image.num_images) == ("jpeg", 80, 4)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"samples_format": "gif"}, "samples_format"),
        ({"samples_format": "bmp"}, "samples_format"),
        ({"samples_format": "jpg", "jpeg_quality": 500}, "jpeg_quality"),
    ],
)
def test_errors_name_the_option_that_was_sent(overrides, name):
    with pytest.raises(RequestValidationError) as caught:
        read(override_settings=overrides)
    error = as_api_error(caught.value.errors())
    assert error.param == f"override_settings.{name}"
    assert error.message.startswith(error.param)


@pytest.mark.parametrize(
    "field", ["n_iter", "send_images", "override_settings", "alwayson_scripts"]
)
def test_a_value_of_any_depth_is_shown_or_its_kind_is(field):
    for depth in range(0, 2 * sys.getrecursionlimit(), 50):
        assert refused(**{field: nested(depth)}).param == field


def test_a_deep_value_is_compared_with_another():
    deep = nested(2 * sys.getrecursionlimit())
    error = refused(n_iter=deep, nIter=nested(2 * sys.getrecursionlimit()))
    assert "nested too deeply" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"Model": "sdxl"}, "Model"), ({"responseFormat": "url"}, "responseFormat")],
)
def test_what_this_server_has_not_is_named_as_it_was_sent(fields, param):
    settings = Settings()
    engine = SimpleNamespace(model=MODEL)
    services = Services(settings, engine, Keys.from_settings(settings), None, None, None, 0)
    asked = request_model("common", any_fields=False).model_validate({"prompt": "a fox", **fields})
    with pytest.raises(ApiError) as caught:
        resolve_asked(services, asked, "id")
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def nested(depth: int) -> list:
    value: list = [0]
    for _ in range(depth):
        value = [value]
    return value


def test_a_prompt_that_was_cut_is_named_as_it_was_sent():
    def warnings(cut: bool, **fields) -> tuple[list[str], list[str]]:
        asked = read_txt2img({"seed": 7, **fields}, max_n=10)
        message = resolve(asked.request, "id", RAW, max_n=10, max_prompt=32_000)
        generated = Generated("id", (b"x",), stage_ms={}, prompt_cut=cut)
        body = json.loads(b"".join(txt2img_answer(asked, message, generated, "krea")))
        info = json.loads(body["info"])
        return body.get("warnings", []), info.get("warnings", [])

    assert warnings(False, prompt="a fox") == ([], [])
    for said in warnings(True, positive_prompt="a fox"):
        assert [text.split(":")[0] for text in said] == ["positive_prompt"]
    for said in warnings(True, prompt="a fox", negative_prompt="rain", cfg_scale=3):
        assert [text.split(":")[0] for text in said] == ["prompt or negative_prompt"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = sorted({*REFUSED, *NO_EFFECT, "override_settings", "batch_size", "n_iter", "send_images"})


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=4))
def test_whatever_is_sent_is_read_or_refused(fields):
    try:
        _, warnings = read(**fields)
    except (ApiError, RequestValidationError):
        return
    "".join(warnings).encode()


@pytest.mark.parametrize(("accept", "status"), [("common", 200), ("openai", 404)])
def test_openais_contract_to_the_letter_leaves_this_api_away(accept, status):
    settings = Settings(accept=accept)
    engine = SimpleNamespace(model=MODEL)
    services = Services(settings, engine, Keys.from_settings(settings), None, None, None, 0)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/sdapi/v1/options")

    assert asyncio.run(ask()).status_code == status


IMAGE = ImageRequest("a fox\nin snow", 64, 96, 8, 3.5, "rain", 7, num_images=2)


def test_progress_counts_the_steps_of_one_client_and_foresees_their_end():
    async def play() -> None:
        now = 100.0
        requests = RunningRequests(lambda: now)
        idle = requests.progress("me")
        with requests.request("me", IMAGE) as mine, requests.request("other", IMAGE) as others:
            others.tell(ProgressUpdate("id", 0, 8, 8))
            assert requests.progress("me")["progress"] == 0.0
            assert requests.progress("me")["state"]["job_count"] == 2
            mine.tell(ProgressUpdate("id", 0, 1, 8))
            now += 3.0
            mine.tell(ProgressUpdate("id", 1, 1, 8))
            # 14 steps are to come, at 3 s each.
            assert requests.progress("me")["progress"] == 2 / 16
            assert requests.progress("me")["eta_relative"] == 42.0
            assert requests.progress("me")["state"]["sampling_step"] == 1
            assert requests.progress("other")["state"]["job_no"] == 1
        assert requests.progress("me") == idle

    asyncio.run(play())


def test_only_requests_of_the_client_are_interrupted_and_another_cancel_wins():
    async def waiting(requests: RunningRequests, client: str) -> None:
        with requests.request(client, IMAGE):
            await asyncio.Event().wait()

    async def play() -> None:
        requests = RunningRequests()
        mine, gone, others = (
            asyncio.create_task(waiting(requests, name)) for name in ("me", "me", "other")
        )
        await asyncio.sleep(0)
        requests.interrupt("me")
        requests.interrupt("me")
        gone.cancel("the client has disconnected")
        await asyncio.wait((mine, gone))
        error = mine.exception()
        assert isinstance(error, ApiError)
        assert (error.status, error.code) == (499, "cancelled")
        assert gone.cancelled()
        assert not others.done()
        assert requests.progress("other")["state"]["job_count"] == 2
        others.cancel()

    asyncio.run(play())
