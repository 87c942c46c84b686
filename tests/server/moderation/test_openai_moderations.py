"""An address with the contract of /v1/moderations, well and broken."""

import asyncio
import base64
import logging
import socket

import pytest

from krea2_server.moderation.moderator import ModerationConfigError, ModerationUnavailableError
from tests.clients import openai_client
from tests.server.moderation.address import inputs, result, scored
from tests.server.moderation.conftest import started
from tests.server.moderation.models import picture

SECRET = "a phrase that nobody may read in a log"


@pytest.fixture
def policy(address, write_policy):
    """Write a policy of one checker at the address."""

    def write(rest=(), **fields):
        categories = fields.pop("categories", {"sexual/minors": 0.2, "violence": 0.7})
        checker = {"type": "openai-moderations", "url": address.url, "categories": categories}
        return write_policy(checker | fields, **dict(rest))

    return write


def check_prompts(file, *prompts, low=False):
    async def check():
        async with started(file) as moderator:
            return await moderator.check_prompts(prompts, low)

    return asyncio.run(check())


def check_images(file, *images):
    async def check():
        async with started(file) as moderator:
            return await moderator.check_images(images)

    return asyncio.run(check())


def test_our_address_answers_as_the_official_client_expects(address):
    address.respond = scored(violence=0.9)
    client = openai_client(address.url)
    answer = client.moderations.create(input=["one", "two"])
    assert [found.category_scores.violence for found in answer.results] == [0.9, 0.9]


def test_prompts_are_sent_together(address, policy):
    address.respond = scored(sexual__minors=0.1, violence=0.1)
    assert check_prompts(policy(), "a fox", "ugly").allowed
    assert address.requests == [{"input": ["a fox", "ugly"]}]
    assert "authorization" not in address.headers


def test_model_and_key_are_sent(address, policy, monkeypatch):
    monkeypatch.setenv("MODERATION_TEST_KEY", "sk-123\n")
    address.respond = scored(sexual__minors=0.1, violence=0.1)
    file = policy(model="omni-moderation-latest", api_key_env="MODERATION_TEST_KEY")
    assert check_prompts(file, "a fox").allowed
    assert address.requests[0]["model"] == "omni-moderation-latest"
    assert address.headers["authorization"] == "Bearer sk-123"


@pytest.mark.parametrize("key", ["", "sk-\u00fc"])
def test_a_key_that_cannot_be_used_is_an_error_at_start(policy, monkeypatch, key):
    monkeypatch.setenv("MODERATION_TEST_KEY", key)
    wanted = r"policy\.yaml: checkers\[0\] \(openai-moderations\): api_key_env: MODERATION_TEST_KEY"
    with pytest.raises(ModerationConfigError, match=wanted) as caught:
        check_prompts(policy(api_key_env="MODERATION_TEST_KEY"), "a fox")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_images_are_sent_as_data_urls(address, policy, file_format):
    address.respond = scored(sexual__minors=0.1, violence=0.1)
    images = [picture(level, file_format=file_format) for level in (10, 200)]
    assert check_images(policy(), *images).allowed
    sent = sorted(address.requests, key=str)
    wanted = [
        f"data:image/{file_format.lower()};base64,{base64.b64encode(image).decode()}"
        for image in images
    ]
    assert sent == sorted(
        ({"input": [{"type": "image_url", "image_url": {"url": url}}]} for url in wanted), key=str
    )


def test_only_what_the_policy_says_is_sent(address, policy):
    assert check_prompts(policy(checks=["image"]), "a fox").allowed
    assert check_images(policy(checks=["prompt"]), picture(1)).allowed
    assert check_prompts(policy(low={}), "a fox", low=True).allowed
    assert check_prompts(policy(), "", "  \n").allowed
    assert check_prompts(policy()).allowed
    assert address.requests == []


@pytest.mark.parametrize(("score", "allowed"), [(0.69, True), (0.7, False), (1, False)])
def test_a_threshold_is_the_least_that_is_refused(address, policy, score, allowed):
    address.respond = scored(sexual__minors=0.1, violence=score, other=1.0)
    verdict = check_prompts(policy(), "a fox")
    assert verdict.allowed is allowed
    assert verdict.categories == (() if allowed else ("violence",))
    assert verdict.checker == ("" if allowed else f"openai-moderations {address.url}")


def test_categories_are_sorted(address, policy):
    address.respond = scored(violence=0.9, sexual__minors=0.9)
    assert check_prompts(policy(), "a fox").categories == ("sexual/minors", "violence")


def test_one_result_of_several_is_enough(address, policy):
    def respond(request):
        scores = [
            {"sexual/minors": 0.0, "violence": float("bad" in text)} for text in inputs(request)
        ]
        return 200, {"results": [result(each) for each in scores]}

    address.respond = respond
    assert not check_prompts(policy(), "a fox", "bad").allowed
    assert not check_prompts(policy(), "bad", "a fox").allowed
    address.respond = lambda _: (200, {"results": [
        result({"sexual/minors": 0.0, "violence": score}) for score in (0.0, 0.9)]})  # fmt: skip
    assert not check_images(policy(), picture(1)).allowed


def test_flags_count_where_there_are_no_scores(address, policy):
    def flagged(violence, **more):
        flags = {"sexual/minors": False, "violence": violence}
        return lambda _: (200, {"results": [{"flagged": violence, "categories": flags, **more}]})

    for more in ({}, {"category_scores": None}, {"category_scores": {"sexual/minors": 0.1}}):
        address.respond = flagged(True, **more)
        assert check_prompts(policy(), "a fox").categories == ("violence",)
        address.respond = flagged(False, **more)
        assert check_prompts(policy(), "a fox").allowed


SCORES = {"sexual/minors": 0.0}
UNUSABLE = [
    (500, {"error": "out of order"}),
    (401, {"error": "who are you"}),
    (301, b""),
    (201, {"results": [result({**SCORES, "violence": 0.0})]}),
    (200, b""),
    (200, b"garbage \xff"),
    (200, b"[" * 100_000),
    (200, {}),
    (200, []),
    (200, {"results": []}),
    (200, {"results": None}),
    (200, {"results": ["no"]}),
    (200, {"results": [result(SCORES)]}),
    (200, {"results": [{"category_scores": {**SCORES, "violence": "0.0"}}]}),
    (200, {"results": [{"category_scores": {**SCORES, "violence": None}}]}),
    (200, {"results": [{"category_scores": {**SCORES, "violence": False}}]}),
    (200, b'{"results": [{"category_scores": {"sexual/minors": 0, "violence": NaN}}]}'),
    (200, {"results": [{"categories": {"sexual/minors": False, "violence": "no"}}]}),
]


@pytest.mark.parametrize("answer", UNUSABLE, ids=lambda answer: str(answer)[:60])
def test_an_answer_that_says_nothing_is_none(address, policy, answer, caplog):
    caplog.set_level(logging.DEBUG)
    address.respond = lambda _: answer
    with pytest.raises(ModerationUnavailableError, match="openai-moderations http"):
        check_prompts(policy(), SECRET)
    assert check_prompts(policy({"on_error": "allow"}), SECRET).allowed
    assert SECRET not in caplog.text


def test_fewer_results_than_prompts_leave_one_unchecked(address, policy):
    address.respond = lambda _: (200, {"results": [result({**SCORES, "violence": 0.0})]})
    assert check_prompts(policy(), "a fox").allowed
    with pytest.raises(ModerationUnavailableError, match="too few results"):
        check_prompts(policy(), "a fox", "another")


def test_a_slow_answer_is_none(address, policy):
    address.respond = scored(sexual__minors=0.0, violence=0.0)
    address.hold.set()
    with pytest.raises(ModerationUnavailableError, match=r"no answer within 0\.2 s"):
        check_prompts(policy({"timeout_s": 0.2}), "a fox")


def test_nobody_at_the_address(policy):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ModerationUnavailableError, match="ConnectError"):
        check_prompts(policy(url=url), "a fox")


def test_a_broken_connection_is_tried_again_once(address, policy):
    address.respond = scored(sexual__minors=0.0, violence=0.9)
    address.hang_ups = 1
    assert not check_prompts(policy(), "a fox").allowed
    assert len(address.requests) == 2
    address.hang_ups = 2
    with pytest.raises(ModerationUnavailableError, match="RemoteProtocolError"):
        check_prompts(policy(), "a fox")
    assert len(address.requests) == 4


def test_connections_are_kept(address, policy):
    address.respond = scored(sexual__minors=0.0, violence=0.0)

    async def check():
        async with started(policy()) as moderator:
            for _ in range(5):
                assert (await moderator.check_prompts(["a fox"])).allowed

    asyncio.run(check())
    assert address.connections == 1


def test_half_a_surrogate_pair_is_checked_too(address, policy):
    address.respond = scored(sexual__minors=0.0, violence=0.9)
    assert not check_prompts(policy(), "a \ud83e fox").allowed


def test_checks_are_counted_by_stage_and_outcome(address, policy):
    async def check():
        async with started(policy({"timeout_s": 120})) as moderator:
            assert set(moderator.counts.values()) == {0}
            for violence in (0.0, 0.9):
                address.respond = scored(sexual__minors=0.0, violence=violence)
                await moderator.check_prompts(["a fox", "another"])
                await moderator.check_images([picture(1), picture(2)])
            address.respond = lambda _: (500, b"")
            with pytest.raises(ModerationUnavailableError):
                await moderator.check_prompts(["a fox"])
            return moderator.counts

    stages, outcomes = ("prompt", "image"), ("allowed", "refused", "error")
    wanted = {(stage, outcome): 1 for stage in stages for outcome in outcomes}
    assert asyncio.run(check()) == wanted | {("image", "error"): 0}


def test_an_unchecked_content_that_is_let_through_is_an_error_all_the_same(address, policy):
    async def check():
        async with started(policy({"on_error": "allow"})) as moderator:
            address.respond = lambda _: (500, b"")
            assert (await moderator.check_prompts(["a fox"])).allowed
            return moderator.counts

    counts = asyncio.run(check())
    assert (counts["prompt", "error"], counts["prompt", "allowed"]) == (1, 0)
