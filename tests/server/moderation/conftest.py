"""Models made once, and one moderator with them for the tests that need a process of models."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from krea2_server.moderation.moderator import Moderator
from tests.server.moderation.address import Address, moderations_address
from tests.server.moderation.models import write_image_model, write_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("models") / "image")


@pytest.fixture
def address() -> Iterator[Address]:
    with moderations_address() as running:
        yield running


@pytest.fixture
def write_policy(tmp_path: Path) -> Callable[..., Path]:
    """Write a policy's file: checkers, and the rest by name."""

    def write(*checkers: dict[str, Any], **rest: Any) -> Path:
        file = tmp_path / "policy.yaml"
        file.write_text(yaml.safe_dump({"checkers": list(checkers), **rest}))
        return file

    return write


@contextlib.asynccontextmanager
async def started(file: Path) -> AsyncIterator[Moderator]:
    moderator = Moderator.from_file(file)
    await moderator.start()
    try:
        yield moderator
    finally:
        await moderator.close()


@pytest.fixture(scope="session")
def models_policy(
    text_model: Path, image_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both models; at low, lewd texts pass and images need a score of 0.9."""
    text = {
        "type": "text-classification",
        "model": str(text_model),
        "categories": {"toxic": 0.5, "sexual": 0.5},
        "low": {"toxic": 0.5},
    }
    image = {
        "type": "image-classification",
        "model": str(image_model),
        "categories": {"nsfw": 0.5},
        "low": {"nsfw": 0.9},
    }
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    file.write_text(yaml.safe_dump({"checkers": [text, image], "timeout_s": 300}))
    return file


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Run a coroutine on the loop that the module's moderator lives on."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def moderator(models_policy: Path, run: Callable[..., Any]) -> Iterator[Moderator]:
    """Started, with `models_policy`."""
    moderator = Moderator.from_file(models_policy)
    run(moderator.start())
    yield moderator
    run(moderator.close())
