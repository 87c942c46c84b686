"""What the page says when something is wrong, and how it gets out of it."""

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.stand_in import Script
from tests.server.playground.test_generating import finished, generate


@pytest.fixture
def expected_errors() -> list[str]:
    statuses = [f"status of {status}" for status in (400, 401, 429, 503)]
    return [*statuses, "ERR_INCOMPLETE_CHUNKED_ENCODING", "net::ERR_FAILED"]


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (400, {}, "size: must be a multiple of 16, got <1000>"),
        (
            429,
            {"Retry-After": "7"},
            "size: must be a multiple of 16, got <1000>. Try again in 7 s.",
        ),
        (503, {"Retry-After": "30"}, "Try again in 30 s."),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    script: Script, page: Page, status: int, headers: dict, said: str
):
    script.refusal = (status, "size: must be a multiple of 16, got <1000>", headers)
    generate(page, "a fox", count="2")
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.locator(".tile")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    script.refusal = None
    page.locator("#size").select_option("256x256")
    page.locator("#generate").click()
    expect(finished(page)).to_have_count(2)
    expect(page.locator("#alert")).to_be_empty()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("error", "the generation failed"),
        ("lost", "The connection to the server was lost."),
        ("broken", "The connection to the server was lost."),
    ],
)
@pytest.mark.slow
def test_a_stream_that_ends_badly_is_reported(script: Script, page: Page, end: str, said: str):
    script.end = end
    page.locator("#size").select_option("256x256")
    generate(page, "a fox")
    expect(page.get_by_role("alert")).to_have_text(said)
    expect(page.locator(".tile")).to_have_count(0)
    expect(page.locator(".job")).to_have_count(0)


def test_a_missing_key_is_asked_for_and_then_used(
    script: Script, blank_page: Page, playground_url: str
):
    script.key = "secret-7"
    blank_page.goto(playground_url)
    key = blank_page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(blank_page.get_by_role("alert")).to_contain_text("API key is missing")
    key.fill("secret-7")
    blank_page.locator("#size").select_option("256x256")
    generate(blank_page, "a fox")
    expect(finished(blank_page)).to_have_count(1)
    expect(blank_page.locator("#alert")).to_be_empty()
    blank_page.reload()
    expect(blank_page.locator("#server")).to_have_text("krea-2-turbo")
    assert blank_page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


@pytest.mark.slow
def test_a_key_that_is_no_longer_good_is_asked_for(script: Script, page: Page):
    script.key = "new"
    generate(page, "a fox")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("new")
    page.locator("#size").select_option("256x256")
    page.get_by_label("API key").press("Enter")
    expect(finished(page)).to_have_count(1)


def test_while_the_model_loads_the_page_waits(
    script: Script, blank_page: Page, playground_url: str
):
    script.ready = False
    blank_page.goto(playground_url)
    expect(blank_page.locator("#server")).to_have_text("the model is loading")
    generate(blank_page, "a fox")
    expect(blank_page.get_by_role("alert")).to_have_text("Not yet: the model is loading.")
    assert script.bodies == []
    script.ready = True
    expect(blank_page.locator("#server")).to_have_text("krea-2-turbo")
    expect(blank_page.locator("#alert")).to_be_empty()


@pytest.mark.slow
def test_a_size_that_is_chosen_while_the_model_loads_is_kept(
    script: Script, blank_page: Page, playground_url: str
):
    script.ready, script.limits = False, {"trained_side": 256}
    blank_page.goto(playground_url)
    blank_page.locator("#size").select_option("512x512")
    script.ready = True
    expect(blank_page.locator("#server")).to_have_text("krea-2-turbo")
    assert blank_page.locator("#size").input_value() == "512x512"


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_looked_for(script: Script, page: Page):
    page.route("**/ready", lambda route: route.abort())
    page.route("**/generations", lambda route: route.abort())
    generate(page, "a fox")
    expect(page.locator("#server")).to_have_text("the server cannot be reached")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    page.unroute("**/ready")
    expect(page.locator("#server")).to_have_text("krea-2-turbo")


def test_the_watch_over_the_page_sees_breaches_of_the_policy(page: Page, problems: list[str]):
    with page.expect_console_message(lambda said: "Content Security Policy" in said.text):
        page.evaluate("document.body.setAttribute('style', 'color: red')")
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    assert any("Content Security Policy" in problem for problem in problems)
    problems.clear()
