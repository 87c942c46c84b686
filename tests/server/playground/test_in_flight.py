"""While a request is on its way: its place, its steps, Stop, and others beside it."""

import pytest
from playwright.sync_api import Page, expect

from tests.channel import wait_until
from tests.server.playground.stand_in import Script
from tests.server.playground.test_generating import finished, generate


def test_a_waiting_request_tells_its_place(script: Script, page: Page):
    script.ahead, script.hold_at = 3, {0}
    generate(page, "a fox", count="2")
    expect(page.locator(".progress-text")).to_have_text(["waiting, 3 ahead"] * 2)
    expect(page.locator(".job-state")).to_have_text("waiting, 3 ahead")


def test_steps_and_previews_follow_one_another(script: Script, page: Page):
    script.hold_at = {2, 3, 4}
    page.locator("#size").select_option("256x256")
    generate(page, "a fox")
    text, image = page.locator(".progress-text"), page.locator(".tile img")
    expect(text).to_have_text("step 2 of 8")
    expect(image).to_be_visible()
    first = image.get_attribute("src")
    script.hold_at = {3, 4}
    expect(text).to_have_text("step 3 of 8")
    assert image.get_attribute("src") == first
    assert page.locator("progress").evaluate("bar => bar.value / bar.max") == 3 / 8
    script.hold_at = {4}
    expect(text).to_have_text("step 4 of 8")
    expect(image).not_to_have_attribute("src", first)
    assert image.get_attribute("src").startswith("data:")
    script.hold_at = set()
    expect(finished(page)).to_have_count(1)


def test_a_late_preview_does_not_set_the_steps_back(page: Page):
    text = page.evaluate(
        """async () => {
            const { Tile } = await import("/playground/tile.js");
            const tile = new Tile({ prompt: "a fox", size: "256x256" }, {});
            for (const step of [4, 5, 4]) tile.step(step, 8);
            return tile.find(".progress-text").textContent;
        }"""
    )
    assert text == "step 5 of 8"


def test_stop_frees_the_server(script: Script, page: Page):
    script.hold_at = {2}
    generate(page, "a fox", count="2")
    expect(page.locator(".tile[data-state=generating]")).to_have_count(2)
    assert script.left == 0
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: script.left == 1)
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator(".tile")).to_have_count(0)
    expect(page.locator("#alert")).to_be_empty()
    expect(page.locator("#generate")).to_be_focused()


@pytest.mark.slow
def test_a_second_request_starts_beside_the_first_and_each_has_its_stop(script: Script, page: Page):
    script.hold_at = {4}
    generate(page, "first", count="2")
    expect(page.locator(".tile[data-state=generating]")).to_have_count(2)
    generate(page, "second", count="1")
    expect(page.locator(".tile[data-state=generating]")).to_have_count(3)
    page.get_by_role("button", name="Stop: second").click()
    wait_until(lambda: script.left == 1)
    page.locator("#prompt").fill("a third, being typed")
    script.hold_at = set()
    expect(finished(page)).to_have_count(2)
    assert finished(page).locator(".prompt").all_inner_texts() == ["first", "first"]
    assert script.left == 1


def test_a_held_enter_key_is_one_request(script: Script, page: Page):
    script.hold_at = {0}
    page.locator("#prompt").fill("a fox")
    page.locator("#prompt").focus()
    for _ in range(5):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    wait_until(lambda: script.bodies)
    expect(page.locator(".job")).to_have_count(1)


def test_the_request_is_what_the_form_says(script: Script, page: Page):
    script.hold_at = {0}
    page.locator("#more summary").click()
    generate(
        page, "  a “fox”\n", seed="007", count="2", guidance="3.5", negative="blurry", steps="12"
    )
    wait_until(lambda: script.bodies)
    assert script.bodies == [
        {
            "model": "krea-2-turbo",
            "prompt": "a “fox”",
            "n": 2,
            "size": "1024x1024",
            "output_format": "png",
            "seed": 7,
            "num_inference_steps": 12,
            "guidance_scale": 3.5,
            "negative_prompt": "blurry",
            "stream": True,
            "partial_images": 3,
        }
    ]


def test_what_would_be_refused_or_is_empty_is_not_sent(script: Script, page: Page):
    script.hold_at = {0}
    page.locator("#more summary").click()
    generate(page, "a fox", steps="", guidance="0", negative="blurry")
    wait_until(lambda: script.bodies)
    assert "negative_prompt" not in script.bodies[0]
    assert "num_inference_steps" not in script.bodies[0]
    assert "seed" not in script.bodies[0]


def test_a_prompt_that_is_cut_is_said_to_be(script: Script, page: Page):
    script.truncated = True
    page.locator("#size").select_option("256x256")
    generate(page, "a fox " * 600)
    expect(finished(page).locator(".note")).to_contain_text("only the beginning")
