"""Chromium, and the playground open in it; `playground_url` says where, in each tier."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.channel import PATIENCE_S
from tests.programs import required

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--in-process-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> "Iterator[Browser]":
    """A running Chromium; without one the test is skipped, and fails in CI.

    Playwright runs a loop in this thread while it is open, beside which there can be no other: not
    for a whole session.
    """
    from playwright.sync_api import expect, sync_playwright

    path = required("chromium")
    expect.set_options(timeout=PATIENCE_S * 1e3)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


# Not of the session: Playwright runs a loop in this thread, beside which there can be no other.
@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with chromium() as browser:
        yield browser


@pytest.fixture
def context_options() -> dict:
    """Options of the browser's context; a test module or a parametrization changes them.

    Tests with the same share a tab: who emulates something of it has options of its own.
    """
    return {}


@pytest.fixture
def expected_errors() -> list[str]:
    """Parts of what the browser may say on its console, where a test provokes it."""
    return []


@pytest.fixture
def problems() -> list[str]:
    """What the browser said that it should not have said, breaches of the CSP included."""
    return []


@pytest.fixture(scope="module")
def tabs(browser: "Browser") -> "Iterator[Callable[[dict], Page]]":
    """Gives the tab of a context with some options. Each is opened once: a new one costs a core a
    second, and it begins anew with each address that it goes to.
    """
    opened: dict[str, Page] = {}
    with ExitStack() as contexts:

        def tab(options: dict) -> "Page":
            key = json.dumps(options, sort_keys=True)
            if key not in opened:
                context = contexts.enter_context(browser.new_context(**options))
                context.set_default_timeout(PATIENCE_S * 1e3)
                opened[key] = context.new_page()
            return opened[key]

        yield tab


@pytest.fixture
def blank_page(
    tabs: "Callable[[dict], Page]",
    context_options: dict,
    expected_errors: list[str],
    problems: list[str],
) -> "Iterator[Page]":
    """A page on which nothing has been yet; in the end there must be no problems."""

    def listen(message: "ConsoleMessage") -> None:
        is_expected = any(text in message.text for text in expected_errors)
        if message.type in ("error", "warning") and not is_expected:
            problems.append(message.text)

    def fail(error: object) -> None:
        problems.append(str(error))

    page = tabs(context_options)
    page.on("console", listen)
    page.on("pageerror", fail)
    yield page
    page.remove_listener("console", listen)
    page.remove_listener("pageerror", fail)
    page.unroute_all()
    # The API key is in one of them, for as long as its tab is open.
    page.evaluate("sessionStorage.clear(), localStorage.clear()")
    assert page.context.cookies() == []
    page.goto("about:blank")
    assert problems == []


@pytest.fixture
def page(blank_page: "Page", playground_url: str) -> "Page":
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
