"""Generating with the page; nothing here needs the stand-in's script."""

import re

import pytest
from playwright.sync_api import Page, expect


def generate(page: Page, prompt: str, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Enter")


def finished(page: Page):
    return page.locator(".tile[data-state=done]")


def test_a_prompt_and_enter_generate_a_picture_after_previews(page: Page):
    page.evaluate(
        """() => {
            window.sources = [];
            new MutationObserver((changes) => {
                for (const { target } of changes) window.sources.push(target.src);
            }).observe(document.body, {subtree: true, attributeFilter: ["src"]});
        }"""
    )
    page.locator("#size").select_option("256x256")
    generate(page, "a red fox")
    expect(finished(page)).to_have_count(1)
    *previews, picture = page.evaluate("window.sources")
    assert len(set(previews)) == len(previews) == 3
    assert all(source.startswith("data:image/png;base64,") for source in previews)
    assert picture.startswith("blob:")
    image = page.locator(".tile img")
    image.evaluate("image => image.decode()")
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 256]
    expect(page.locator("#jobs .job")).to_have_count(0)


def test_shift_enter_starts_a_new_line(page: Page):
    prompt = page.locator("#prompt")
    prompt.press_sequentially("one")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("two")
    expect(prompt).to_have_value("one\ntwo")
    expect(page.locator(".tile")).to_have_count(0)


@pytest.mark.slow
def test_several_images_have_seeds_that_count_up(page: Page):
    page.locator("#size").select_option("256x256")
    generate(page, "three hills", count="3", seed="9223372036854775800")
    expect(finished(page)).to_have_count(3)
    facts = finished(page).locator(".facts").all_inner_texts()
    assert [re.search(r"seed (\d+)", text)[1] for text in facts] == [
        "9223372036854775800",
        "9223372036854775801",
        "9223372036854775802",
    ]
    page.locator("#reuse-seed").click()
    expect(page.locator("#seed")).to_have_value("9223372036854775800")


@pytest.mark.slow
def test_a_download_has_a_telling_name(page: Page):
    page.locator("#size").select_option("384x256")
    page.locator("#more summary").click()
    page.locator("#format").select_option("jpeg")
    generate(page, 'A "red" fox/../ in Köln', seed="7")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "krea2-a-red-fox-in-köln-384x256-seed7.jpg"
    assert download.value.path().read_bytes()[:3] == b"\xff\xd8\xff"


def test_a_picture_comes_with_its_prompt_settings_and_timings(page: Page):
    page.locator("#size").select_option("256x256")
    generate(page, "a <b>fox</b> & $HOME", seed="5", steps="8")
    tile = finished(page)
    expect(tile.locator(".prompt")).to_have_text("a <b>fox</b> & $HOME")
    expect(tile.locator(".facts")).to_have_text("256 × 256 · seed 5 · 8 steps")
    assert tile.locator(".timings dt").all_inner_texts() == ["queue", "encode", "denoise", "decode"]


def test_its_settings_can_be_used_again(page: Page):
    page.locator("#size").select_option("custom")
    page.locator("#more summary").click()
    page.locator("#negative").fill("blurry")
    generate(
        page, "a fox", width="272", height="256", seed="5", count="2", guidance="2.5", steps="4"
    )
    expect(finished(page)).to_have_count(2)
    page.locator("#size").select_option("512x512")
    for name in ("prompt", "seed", "steps", "guidance", "negative"):
        page.locator(f"#{name}").fill("")
    finished(page).nth(1).get_by_role("button", name="Use these settings again").click()
    expected = {
        "prompt": "a fox",
        "size": "custom",
        "width": "272",
        "height": "256",
        "count": "1",
        "seed": "6",
        "steps": "4",
        "guidance": "2.5",
        "negative": "blurry",
    }
    assert {name: page.locator(f"#{name}").input_value() for name in expected} == expected
    expect(page.locator("#prompt")).to_be_focused()


@pytest.mark.slow
def test_the_newest_comes_first(page: Page):
    page.locator("#size").select_option("256x256")
    generate(page, "first")
    expect(finished(page)).to_have_count(1)
    generate(page, "second")
    expect(finished(page)).to_have_count(2)
    assert finished(page).locator(".prompt").all_inner_texts() == ["second", "first"]
