"""The whole server: what is refused is neither generated, shown, stored nor logged."""

import httpx
import openai
import pytest
import yaml

from krea2_srt.messages import EngineError
from tests.channel import wait_until
from tests.server.moderation.address import Address, inputs, moderations_address, result
from tests.server.serving import serve

SECRET = "a forbidden thing that nobody may read"
KEYS = """
keys:
  - {name: trusted, key: sk-trusted-0123456789, low_moderation: true}
  - {name: other, key: sk-other-0123456789}
"""
TRUSTED = {"authorization": "Bearer sk-trusted-0123456789"}
OTHER = {"authorization": "Bearer sk-other-0123456789"}
FIELDS = {"prompt": "a fox", "size": "64x64"}


@pytest.fixture(scope="module")
def watched():
    """What checks: it refuses prompts with "forbidden" in them, and images when told to."""
    with moderations_address() as address:
        yield address


@pytest.fixture(autouse=True)
def judge(watched: Address):
    """By default, no image is refused."""

    class Judge:
        bad_image = staticmethod(lambda number: False)
        images = 0

    judge = Judge()

    def respond(request):
        scores = []
        for given in inputs(request):
            if isinstance(given, str):
                scores.append({"violence": float("forbidden" in given), "nsfw": 0.0})
            else:
                judge.images += 1
                bad = judge.bad_image(judge.images)
                scores.append({"violence": 0.0, "nsfw": float(bad)})
        return 200, {"results": [result(each) for each in scores]}

    watched.respond = respond
    watched.requests.clear()
    return judge


@pytest.fixture(scope="module")
def moderated(shared_engine, watched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moderated")
    checker = {"type": "openai-moderations", "url": watched.url}
    checker |= {"categories": {"violence": 0.5, "nsfw": 0.5}, "low": {"violence": 0.5}}
    (folder / "policy.yaml").write_text(yaml.safe_dump({"checkers": [checker], "timeout_s": 120}))
    (folder / "keys.yaml").write_text(KEYS)
    flags = ["--moderation-policy", "policy.yaml", "--api-keys-file", "keys.yaml"]
    with serve(folder, "--engine-endpoints", shared_engine.endpoint, *flags) as server:
        yield server


def check_refused(response, category: str) -> None:
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "content_policy_violation"
    assert category in error["message"]
    assert response.headers["x-should-retry"] == "false"


def test_prompts_and_images_are_checked_on_a1111s_path_too(moderated, engine, judge):
    def ask(**fields):
        url = f"{moderated.url}/sdapi/v1/txt2img"
        return httpx.post(url, json={"width": 64, "height": 64, **fields}, headers=OTHER)

    check_refused(ask(prompt=SECRET), "violence")
    assert not engine.requests
    assert ask(prompt="a fox").status_code == 200
    judge.bad_image = lambda number: True
    refused = ask(prompt="a fox", n_iter=2)
    check_refused(refused, "nsfw")
    assert "images" not in refused.json()


def test_what_is_refused_is_in_no_file(moderated, engine, judge):
    told = {"embed_metadata": True, "guidance_scale": 2, "response_format": "url"}
    before = set(moderated.folder.rglob("*.png"))
    for prompts in ({"prompt": SECRET}, {"prompt": "a fox", "negative_prompt": SECRET}):
        check_refused(moderated.post(OTHER, **prompts, size="64x64", **told), "violence")
    assert not engine.requests
    judge.bad_image = lambda number: True
    check_refused(moderated.post(OTHER, **FIELDS, **told), "nsfw")
    assert set(moderated.folder.rglob("*.png")) == before


def test_a_refused_prompt_is_never_generated_and_never_logged(moderated, engine):
    refused = moderated.metric("krea2_moderation_checks_total", outcome="refused", stage="prompt")
    response = moderated.post(OTHER, prompt=SECRET, size="64x64", user="user-secret")
    check_refused(response, "violence")
    assert response.json()["error"]["param"] == "prompt"
    assert SECRET not in response.text
    assert not engine.requests
    assert SECRET not in moderated.log
    assert "refused by the content policy" in moderated.log
    count = moderated.metric("krea2_moderation_checks_total", outcome="refused", stage="prompt")
    assert count == refused + 1
    assert moderated.metric("krea2_requests_total", outcome="content_policy_violation") >= 1


def test_the_official_client_sees_a_bad_request(moderated, engine):
    client = moderated.client(api_key="sk-other-0123456789")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt=SECRET, size="64x64", stream=stream)
        assert caught.value.code == "content_policy_violation"


def test_a_negative_prompt_is_a_prompt(moderated, engine):
    fields = {**FIELDS, "guidance_scale": 2.0, "negative_prompt": "forbidden"}
    check_refused(moderated.post(OTHER, **fields), "violence")


def test_one_image_of_several_is_enough_and_none_is_stored(moderated, engine, judge, tmp_path):
    judge.bad_image = lambda number: number == 2
    check_refused(moderated.post(OTHER, **FIELDS, n=3, response_format="url"), "nsfw")
    folder = moderated.folder / "images"
    assert [file.name for file in folder.iterdir() if "-" in file.name] == []
    assert len(engine.requests) == 1


def test_a_refused_image_ends_a_stream_with_an_error_event(moderated, engine, judge):
    judge.bad_image = lambda number: number == 3
    engine.step_s = 0.02
    stream = moderated.client(api_key="sk-other-0123456789").images.generate(
        **FIELDS, stream=True, partial_images=2
    )
    events = []
    with pytest.raises(openai.APIError) as caught:
        for event in stream:
            events.append(event.type)
    assert caught.value.code == "content_policy_violation"
    assert events == ["image_generation.partial_image"] * 2


def test_a_preview_is_checked_before_it_is_shown(moderated, engine, judge):
    judge.bad_image = lambda number: number == 1
    engine.step_s = 0.05
    response = moderated.post(OTHER, **FIELDS, stream=True, partial_images=3)
    assert "content_policy_violation" in response.text
    assert "partial_image" not in response.text
    wait_until(lambda: engine.cancelled)  # nothing goes on


def test_low_holds_for_keys_that_may_ask_for_it(moderated, engine, judge):
    judge.bad_image = lambda number: True
    assert moderated.post(OTHER, **FIELDS, moderation="low").status_code == 403
    assert moderated.post(TRUSTED, **FIELDS, moderation="low").status_code == 200
    check_refused(moderated.post(TRUSTED, **FIELDS), "nsfw")
    check_refused(moderated.post(TRUSTED, prompt=SECRET, moderation="low"), "violence")


def test_without_its_checker_nothing_is_generated(moderated, engine, watched):
    watched.respond = lambda _: (500, b"")
    response = moderated.post(OTHER, **FIELDS)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "moderation_unavailable"
    assert response.headers["x-should-retry"] == "true"
    assert not engine.requests


def test_a_failed_request_has_no_images_to_check(moderated, engine, judge):
    engine.error = EngineError("generation_failed", "it went wrong")
    assert moderated.post(OTHER, **FIELDS).status_code == 500
    assert judge.images == 0


@pytest.mark.slow
def test_classifiers_on_the_server(shared_engine, engine, models_policy, tmp_path):
    flags = ["--engine-endpoints", engine.endpoint, "--moderation-policy", str(models_policy)]
    with serve(tmp_path, *flags, timeout_s=300) as server:
        assert server.post(prompt="a red fox", size="64x64", seed=10).status_code == 200
        check_refused(server.post(prompt="a forbidden fox", size="64x64"), "toxic")
        # The fake engine generates in the shade of the seed.
        check_refused(server.post(prompt="a red fox", size="64x64", seed=250), "nsfw")
