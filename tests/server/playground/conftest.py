"""A browser, the playground open in it, and a stand-in for the server.

To point the tests at another server, override `playground_url`; those that take `script` need the
stand-in.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page

from tests.server.playground.browser import chromium
from tests.server.playground.stand_in import Script, StandIn, running

TIMEOUT_MS = 10_000


# Not of the session: Playwright runs a loop in this thread, beside which there can be no other.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="session")
def playground_url(stand_in: StandIn) -> Iterator[str]:
    """Where the page is served."""
    with running(stand_in) as url:
        yield url


@pytest.fixture(autouse=True)
def script(stand_in: StandIn) -> Script:
    """What the stand-in does in this test."""
    stand_in.script = Script()
    return stand_in.script


@pytest.fixture
def context_options() -> dict:
    """Of the browser's context; a test module or a parametrization changes them."""
    return {}


@pytest.fixture
def expected_errors() -> list[str]:
    """Parts of what the browser may say on its console, where a test provokes it."""
    return []


@pytest.fixture
def problems() -> list[str]:
    """What the browser said that it should not have said, breaches of the CSP included."""
    return []


@pytest.fixture
def blank_page(
    browser: Browser, context_options: dict, expected_errors: list[str], problems: list[str]
) -> Iterator[Page]:
    """A page of its own; in the end there must be no problems."""

    def listen(message: ConsoleMessage) -> None:
        is_expected = any(text in message.text for text in expected_errors)
        if message.type in ("error", "warning") and not is_expected:
            problems.append(message.text)

    with browser.new_context(**context_options) as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
    assert problems == []


@pytest.fixture
def page(blank_page: Page, playground_url: str) -> Page:
    """The playground, ready to draw."""
    blank_page.goto(playground_url)
    blank_page.locator("#server[data-state=ready]").wait_for()
    return blank_page


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for screenshots."""
    folder = os.environ.get("KREA2_TEST_ARTEFACTS")
    if not folder:
        return tmp_path_factory.mktemp("playground")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path
