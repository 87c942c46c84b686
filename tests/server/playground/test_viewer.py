"""One picture large, the gallery's length, and all of it by keyboard."""

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.test_generating import finished, generate


@pytest.fixture
def generated(page: Page) -> Page:
    """The page with three pictures, seeds 1 to 3."""
    page.locator("#size").select_option("256x256")
    generate(page, "hills", count="3", seed="1")
    expect(finished(page)).to_have_count(3)
    return page


@pytest.mark.slow
def test_arrow_keys_go_through_the_gallery_and_escape_closes(generated: Page):
    finished(generated).nth(0).locator(".open").click()
    facts = generated.locator("#viewer .facts")
    expect(facts).to_contain_text("1 of 3")
    expect(facts).to_contain_text("seed 1 ")
    generated.keyboard.press("ArrowLeft")
    expect(facts).to_contain_text("1 of 3")
    generated.locator("#viewer-older").click()
    generated.keyboard.press("ArrowRight")
    generated.keyboard.press("ArrowRight")
    expect(facts).to_contain_text("3 of 3")
    expect(facts).to_contain_text("seed 3 ")
    url = finished(generated).nth(2).locator("img").get_attribute("src")
    assert generated.locator("#viewer-image").get_attribute("src") == url
    generated.keyboard.press("ArrowLeft")
    generated.keyboard.press("Escape")
    expect(generated.locator("#viewer")).to_be_hidden()
    expect(finished(generated).nth(1).locator(".open")).to_be_focused()


@pytest.mark.slow
def test_settings_are_taken_over_from_the_large_picture(generated: Page):
    finished(generated).nth(2).locator(".open").click()
    generated.locator("#viewer").get_by_role("button", name="Use these settings again").click()
    expect(generated.locator("#viewer")).to_be_hidden()
    expect(generated.locator("#prompt")).to_be_focused()
    expect(generated.locator("#seed")).to_have_value("3")


@pytest.mark.slow
def test_the_gallery_keeps_a_hundred(page: Page):
    page.locator("#size").select_option("custom")
    # Eleven requests at once: the browser sends six, and the others as these end.
    for request in range(11):
        generate(page, f"request {request}", width="16", height="16", count="10")
    expect(page.locator(".job")).to_have_count(0)
    expect(finished(page)).to_have_count(100)
    prompts = finished(page).locator(".prompt").all_inner_texts()
    assert prompts == [f"request {request}" for request in range(10, 0, -1) for _ in range(10)]


@pytest.mark.slow
def test_everything_works_with_the_keyboard_alone(page: Page):
    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    keyboard = page.keyboard
    assert focused() == "prompt"
    keyboard.type("hills")
    seen = []
    while focused() != "copy-python" and len(seen) < 20:
        if focused() == "size":
            # The first on offer, 256 x 256.
            keyboard.press("Home")
        if focused() == "count":
            keyboard.press("ArrowUp")
        seen.append(focused())
        keyboard.press("Tab")
    # The summary has neither id nor class.
    assert seen == ["prompt", "size", "count", "steps", "seed", "", "generate", "copy-curl"]
    keyboard.press("Shift+Tab")
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    expect(finished(page)).to_have_count(2)
    while focused() != "open":
        keyboard.press("Tab")
    keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    keyboard.press("ArrowRight")
    expect(page.locator("#viewer-position")).to_have_text("2 of 2")
    keyboard.press("Escape")
    expect(finished(page).nth(1).locator(".open")).to_be_focused()
    keyboard.press("Tab")
    assert "download" in focused()
    keyboard.press("Tab")
    keyboard.press("Enter")
    assert focused() == "prompt"
