"""What the form offers and what it refuses."""

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.stand_in import Script


def offered(page: Page) -> list[str]:
    return page.locator("#size option").evaluate_all("options => options.map(o => o.value)")


def test_sizes_are_what_the_model_can_generate(page: Page):
    *sizes, custom = offered(page)
    assert custom == "custom"
    assert {"256x256", "2048x2048", "1536x1024", "1024x1536", "2048x1152", "1152x2048"} <= {*sizes}
    ratios = {(1, 1), (3, 2), (2, 3), (16, 9), (9, 16)}
    for size in sizes:
        width, height = map(int, size.split("x"))
        assert width % 16 == height % 16 == 0
        assert any(width * down == height * across for across, down in ratios), size
    assert page.locator("#size").input_value() == "1024x1024"
    assert page.locator("#steps").input_value() == "8"


def test_the_servers_limits_are_kept(script: Script, blank_page: Page, playground_url: str):
    script.limits = {
        "max_side": 768,
        "max_pixels": 512 * 512,
        "max_n": 4,
        "max_steps": 20,
        "default_steps": 12,
        "max_prompt": 6,
        "output_formats": ["png", "webp"],
    }
    blank_page.goto(playground_url)
    expect(blank_page.locator("#server")).to_have_text("krea-2-turbo")
    assert offered(blank_page)[:2] == ["256x256", "512x512"]
    assert "768x512" not in offered(blank_page)
    assert blank_page.locator("#size").input_value() == "512x512"
    assert blank_page.locator("#steps").input_value() == "12"
    blank_page.locator("#prompt").fill("a fox")
    for field, value in (("count", "5"), ("steps", "21"), ("prompt", "a fox, old")):
        blank_page.locator(f"#{field}").fill(value)
        blank_page.locator("#generate").click()
        expect(blank_page.locator(f"#{field}")).to_be_focused()
        blank_page.locator(f"#{field}").fill("1")
    # A negative prompt that is not sent may be of any length.
    blank_page.locator("#more summary").click()
    blank_page.locator("#negative").fill("too long")
    assert blank_page.locator("#form:valid").count() == 1
    blank_page.locator("#guidance").fill("2")
    assert blank_page.locator("#negative:invalid").count() == 1
    enabled = blank_page.locator("#format option:not([disabled])")
    assert [option.get_attribute("value") for option in enabled.all()] == ["png", "webp"]
    assert script.bodies == []


@pytest.mark.parametrize(
    ("trained_side", "size"),
    [(64, "256x256"), (256, "256x256"), (800, "768x768"), (4096, "1024x1024")],
)
@pytest.mark.slow
def test_the_first_size_is_one_that_the_model_generates_well(
    script: Script, blank_page: Page, playground_url: str, trained_side: int, size: str
):
    script.limits = {"trained_side": trained_side}
    blank_page.goto(playground_url)
    expect(blank_page.locator("#server")).to_have_text("krea-2-turbo")
    assert blank_page.locator("#size").input_value() == size


def test_a_size_of_ones_own_is_checked(script: Script, page: Page):
    page.locator("#prompt").fill("a fox")
    page.locator("#size").select_option("1536x1024")
    expect(page.locator("#width")).to_be_hidden()
    page.locator("#size").select_option("custom")
    expect(page.locator("#width")).to_have_value("1536")
    for width, height in (
        ("1000", "1024"),
        ("2064", "2048"),
        ("4112", "16"),
        ("", "1024"),
        ("1024", "256"),
    ):
        page.locator("#width").fill(width)
        page.locator("#height").fill(height)
        page.locator("#generate").click()
        assert page.locator("#form:invalid").count() == 1, (width, height)
    assert script.bodies == []
    page.locator("#size").select_option("256x256")
    page.locator("#generate").click()
    expect(page.locator(".tile[data-state=done]")).to_have_count(1)


def test_a_blank_prompt_and_a_bad_seed_are_refused(script: Script, page: Page):
    page.locator("#prompt").fill("  \n ")
    page.locator("#prompt").press("Enter")
    assert page.locator("#prompt:invalid").count() == 1
    page.locator("#prompt").fill("a fox")
    for seed in ("-1", "1.5", "abc", str(2**63)):
        page.locator("#seed").fill(seed)
        page.locator("#prompt").press("Enter")
        expect(page.locator("#seed")).to_be_focused()
    page.locator("#seed").fill(str(2**63 - 1))
    assert page.locator("#form:valid").count() == 1
    assert script.bodies == []


def test_what_is_wrong_under_more_is_shown(page: Page):
    page.locator("#more summary").click()
    page.locator("#guidance").fill("-1")
    page.locator("#more summary").click()
    expect(page.locator("#guidance")).to_be_hidden()
    page.locator("#prompt").fill("a fox")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#guidance")).to_be_focused()
