"""Several checkers and one verdict, with models in their own process and an address beside it."""

import asyncio
import logging
import os
import signal

import pytest

from krea2_server.moderation.moderator import (
    ModerationConfigError,
    ModerationUnavailableError,
    Moderator,
)
from tests.channel import PATIENCE_S
from tests.server.moderation.address import scored
from tests.server.moderation.conftest import started
from tests.server.moderation.models import picture

ADDRESS = {"type": "openai-moderations", "categories": {"violence": 0.5}}


def text_checker(model, **fields):
    return {"type": "text-classification", "model": str(model), "categories": {"toxic": 0.5}} | (
        fields
    )


@pytest.mark.slow
def test_prompts_are_read_by_the_text_model_alone(moderator, run):
    assert run(moderator.check_prompts(["a red fox"])).allowed
    verdict = run(moderator.check_prompts(["a red fox", "a forbidden fox"]))
    assert (verdict.allowed, verdict.categories) == (False, ("toxic",))
    assert verdict.checker.startswith("text-classification ")
    assert run(moderator.check_prompts(["a lewd fox"])).categories == ("sexual",)


@pytest.mark.slow
def test_images_are_seen_by_the_image_model_alone(moderator, run):
    assert run(moderator.check_images([picture(20)])).allowed
    verdict = run(moderator.check_images([picture(20), picture(240), picture(20)]))
    assert (verdict.allowed, verdict.categories) == (False, ("nsfw",))


def test_low_has_thresholds_of_its_own(moderator, run):
    assert run(moderator.check_prompts(["a lewd fox"], low=True)).allowed
    assert not run(moderator.check_prompts(["a forbidden fox"], low=True)).allowed
    grey = picture(150)  # a score of 0.85
    assert not run(moderator.check_images([grey])).allowed
    assert run(moderator.check_images([grey], low=True)).allowed


def test_nothing_to_check_is_allowed_and_not_counted(moderator, run):
    before = dict(moderator.counts)
    assert run(moderator.check_prompts(["", " \n"])).allowed
    assert run(moderator.check_images([])).allowed
    assert moderator.counts == before


def test_a_short_prompt_does_not_wait_for_a_long_one(moderator, run):
    long, short = "fox " * 8000, "a red fox"

    async def check() -> list[str]:
        ended: list[str] = []

        async def one(name: str, text: str) -> None:
            await moderator.check_prompts([text])
            ended.append(name)

        await asyncio.gather(*(one("long", long) for _ in range(4)), one("short", short))
        return ended

    assert run(check()) == ["short", *["long"] * 4]


def test_whoever_stops_waiting_stops_the_work(moderator, run):
    async def check() -> None:
        tasks = [asyncio.create_task(moderator.check_prompts(["fox " * 8000])) for _ in range(30)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await moderator.check_prompts(["a red fox"])).allowed
        # The process has said of each that it is given up, before it was done.
        assert not moderator._process._asked

    run(check())


def test_one_checker_that_refuses_is_enough_whatever_the_others_do(
    address, text_model, write_policy
):
    file = write_policy(
        text_checker(text_model), ADDRESS | {"url": address.url}, timeout_s=600, on_error="refuse"
    )

    async def check() -> None:
        async with started(file) as moderator:
            address.respond = scored(violence=0.0)
            assert (await moderator.check_prompts(["a fox"])).allowed
            assert not (await moderator.check_prompts(["a forbidden fox"])).allowed
            address.respond = scored(violence=0.9)
            verdict = await moderator.check_prompts(["a fox"])
            assert verdict.categories == ("violence",)
            # One is broken, the other says no, which says more.
            address.respond = lambda _: (500, b"")
            assert not (await moderator.check_prompts(["a forbidden fox"])).allowed
            with pytest.raises(ModerationUnavailableError):
                await moderator.check_prompts(["a fox"])
            # A slow one does not hold up a refusal.
            address.hold.set()
            async with asyncio.timeout(PATIENCE_S):
                assert not (await moderator.check_prompts(["a forbidden fox"])).allowed

    asyncio.run(check())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "/nowhere"}, r"checkers\[0\] \(text-classification\): model: /nowhere"),
        ({"categories": {"rude": 0.5}}, r"categories\.rude: is none .* labels: toxic, sexual"),
    ],
)
def test_a_policy_that_cannot_be_followed_ends_the_start(text_model, write_policy, fields, said):
    async def check() -> None:
        async with started(write_policy(text_checker(text_model) | fields)):
            pass

    with pytest.raises(ModerationConfigError, match=said) as caught:
        asyncio.run(check())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_models_process_that_dies_is_started_again(text_model, write_policy, caplog):
    caplog.set_level(logging.INFO)
    secret = "forbidden words that nobody may read"

    async def check() -> None:
        async with started(write_policy(text_checker(text_model), timeout_s=300)) as moderator:
            first = worker_pid(moderator)
            os.kill(first, signal.SIGSTOP)
            waiting = asyncio.create_task(moderator.check_prompts([secret]))
            await asyncio.sleep(0.05)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(ModerationUnavailableError, match="died"):
                await waiting
            # Whoever asks meanwhile waits for the new one.
            assert not (await moderator.check_prompts([secret])).allowed
            assert worker_pid(moderator) != first
            last = worker_pid(moderator)
        with pytest.raises(ProcessLookupError):
            os.kill(last, 0)

    asyncio.run(check())
    assert "starting it" in caplog.text
    assert secret not in caplog.text


def worker_pid(moderator: Moderator) -> int:
    process = moderator._process._process
    assert process is not None
    return process.pid
