"""The menu of adapters: what it offers, what is sent of it, and what a picture tells of it."""

import json
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.channel import wait_until
from tests.server.playground.stand_in import Script, adapter
from tests.server.playground.test_generating import finished, generate
from tests.server.playground.test_snippets import copy

SEPIA = adapter(
    "sepia",
    title="Everything in sepia",
    trigger_words=["sepia tones", "ink", " "],
    default_scale=0.8,
)
INK = adapter("acme/ink")
BROKEN = adapter("broken", error="adapter broken: there is no tensor in it")
MORE = [adapter(f"style-{number}") for number in range(4)]


@pytest.fixture
def offered(script: Script) -> list[dict[str, Any]]:
    """What the server lists; a test changes it."""
    script.adapters = [INK, BROKEN, SEPIA]
    return script.adapters


@pytest.fixture
def menu(offered: list[dict[str, Any]], page: Page) -> Locator:
    """The open menu."""
    page.locator("#adapters summary").click()
    expect(page.get_by_label("Add an adapter")).to_be_visible()
    return page.locator("#adapters")


def options(menu: Locator) -> Locator:
    return menu.locator("#adapter option")


def choose(menu: Locator, name: str, scale: str | None = None) -> Locator:
    """Add an adapter; gives its place in the form."""
    menu.get_by_label("Add an adapter").select_option(name)
    menu.get_by_role("button", name="Add", exact=True).click()
    chosen = menu.locator(".adapter").last
    if scale is not None:
        chosen.get_by_role("spinbutton").fill(scale)
    return chosen


def sent(script: Script, page: Page, prompt: str = "a fox") -> Any:
    """The adapters of a request that is generated now."""
    page.locator("#size").select_option("256x256")
    before = len(script.bodies)
    generate(page, prompt)
    wait_until(lambda: len(script.bodies) > before)
    return script.bodies[-1].get("lora")


class TestNothingToOffer:
    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 404"]

    @pytest.mark.parametrize("listed", [[], [BROKEN], None], ids=["none", "broken", "older"])
    def test_there_is_no_menu(
        self, script: Script, blank_page: Page, playground_url: str, listed: list | None
    ):
        script.adapters = listed
        with blank_page.expect_response("**/v1/loras") as answer:
            blank_page.goto(playground_url)
        answer.value.finished()
        assert sent(script, blank_page) is None
        expect(finished(blank_page)).to_have_count(1)
        expect(blank_page.locator("#adapters")).to_be_hidden()


def test_those_that_can_be_used_are_offered_by_title_or_name(menu: Locator):
    expect(options(menu)).to_have_text(["acme/ink", "Everything in sepia"])
    titles = options(menu).evaluate_all("options => options.map((option) => option.title)")
    assert titles == ["acme/ink", "sepia"]


def test_titles_that_two_have_come_with_names(offered: list, menu: Locator):
    offered.append(adapter("sepia-2", title="Everything in sepia"))
    menu.get_by_label("Add an adapter").focus()
    expect(options(menu)).to_have_text(
        ["acme/ink", "Everything in sepia (sepia)", "Everything in sepia (sepia-2)"]
    )


def test_those_that_are_chosen_are_sent_with_their_scales(
    script: Script, menu: Locator, page: Page
):
    choose(menu, "sepia", "-0.35")
    choose(menu, "acme/ink", "7")
    expect(menu.locator("summary")).to_contain_text("2 chosen")
    assert sent(script, page) == [
        {"name": "sepia", "scale": -0.35},
        {"name": "acme/ink", "scale": 7},
    ]
    menu.get_by_role("button", name="Remove Everything in sepia").click()
    assert sent(script, page) == [{"name": "acme/ink", "scale": 7}]
    menu.get_by_role("button", name="Remove acme/ink").click()
    expect(menu.locator("#adapters-count")).to_be_empty()
    assert sent(script, page) is None


def test_a_scale_starts_at_the_default_and_an_empty_one_is_left_to_the_server(
    script: Script, menu: Locator, page: Page
):
    chosen = choose(menu, "sepia")
    number, slider = chosen.get_by_role("spinbutton"), chosen.get_by_role("slider")
    expect(number).to_have_value("0.8")
    expect(slider).to_have_value("0.8")
    number.fill("")
    expect(slider).to_have_value("0.8")
    assert number.get_attribute("placeholder") == "0.8"
    assert sent(script, page) == [{"name": "sepia"}]


def test_slider_and_number_go_together(script: Script, menu: Locator, page: Page):
    chosen = choose(menu, "acme/ink")
    number, slider = chosen.get_by_role("spinbutton"), chosen.get_by_role("slider")
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(number).to_have_value("1.05")
    number.fill("-0.5")
    expect(slider).to_have_value("-0.5")
    number.fill("9.5")
    expect(slider).to_have_value("2")
    number.fill("10.5")
    number.press("Enter")
    assert page.locator("#form:invalid").count() == 1
    assert script.bodies == []


def test_four_different_ones_are_the_limit(offered: list, menu: Locator, page: Page):
    offered += MORE
    menu.get_by_label("Add an adapter").focus()
    expect(options(menu)).to_have_count(6)
    for chosen in MORE:
        choose(menu, chosen["name"])
        expect(options(menu).get_by_text(chosen["name"])).to_have_count(0)
    expect(menu.get_by_label("Add an adapter")).to_be_hidden()
    expect(menu.get_by_text("At most four")).to_be_visible()
    menu.get_by_role("button", name="Remove style-2").click()
    expect(menu.get_by_label("Add an adapter")).to_be_focused()
    expect(menu.get_by_text("At most four")).to_be_hidden()


def test_trigger_words_go_into_the_prompt(menu: Locator, page: Page):
    prompt = page.locator("#prompt")
    prompt.fill("pink hills \n")
    chosen = choose(menu, "sepia")
    assert chosen.locator(".word").all_inner_texts() == ["sepia tones", "ink"]
    # A part of another word is not the word.
    chosen.get_by_role("button", name="Add to the prompt: ink").click()
    expect(prompt).to_have_value("pink hills, ink")
    there = chosen.get_by_role("button", name="In the prompt: ink")
    expect(there).to_have_attribute("aria-disabled", "true")
    expect(there).to_be_focused()
    page.keyboard.press("Enter")
    expect(prompt).to_have_value("pink hills, ink")
    prompt.fill("")
    chosen.get_by_role("button", name="Add to the prompt: sepia tones").click()
    expect(prompt).to_have_value("sepia tones")
    assert page.locator("#prompt:valid").count() == 1
    prompt.fill("In Sepia-Tones.")
    expect(chosen.get_by_role("button", name="In the prompt: sepia tones")).to_be_visible()
    expect(choose(menu, "acme/ink").locator(".words")).to_be_hidden()


class TestSnippets:
    @pytest.fixture
    def context_options(self) -> dict:
        return {"permissions": ["clipboard-read", "clipboard-write"]}

    def test_they_hold_the_adapters(self, menu: Locator, page: Page):
        page.locator("#prompt").fill("a fox")
        choose(menu, "sepia", ".50")
        choose(menu, "acme/ink", "")
        adapters = '"lora": [{"name": "sepia", "scale": 0.5}, {"name": "acme/ink"}]'
        assert adapters in copy(page, "curl")
        (line,) = (line for line in copy(page, "Python").splitlines() if "extra_body" in line)
        extra = json.loads(line.strip().removeprefix("extra_body=").removesuffix(","))
        assert extra["lora"] == [{"name": "sepia", "scale": 0.5}, {"name": "acme/ink"}]


def test_a_picture_tells_them_and_brings_them_back(
    script: Script, offered: list, menu: Locator, page: Page
):
    choose(menu, "sepia", "")
    choose(menu, "acme/ink", "-2.5")
    page.locator("#size").select_option("256x256")
    generate(page, "a fox", seed="5")
    facts = "256 × 256 · seed 5 · 8 steps · acme/ink at -2.5 · sepia at 0.8"
    expect(finished(page).locator(".facts")).to_have_text(facts)
    menu.get_by_role("button", name="Remove acme/ink").click()
    choose(menu, "acme/ink", "1")
    finished(page).locator(".open").click()
    expect(page.locator("#viewer-facts")).to_have_text(facts)
    # By then the one has gone, and the other has a new default.
    offered[:] = [{**SEPIA, "default_scale": 0.2}]
    page.locator("#viewer-reuse").click()
    expect(menu.locator(".adapter-label")).to_have_text(["Everything in sepia", "acme/ink"])
    again = [{"name": "sepia", "scale": 0.8}, {"name": "acme/ink", "scale": -2.5}]
    script.adapters = [SEPIA, INK]
    assert sent(script, page) == again


def test_what_the_prompt_itself_names_is_told_but_not_chosen(page: Page):
    adapters = page.evaluate(
        """async () => {
            const { Tile } = await import("/playground/tile.js");
            const tile = new Tile({ prompt: "a <lora:ink:1>", size: "16x16", adapters: [] }, {});
            const lora = [{ name: "ink", scale: 1 }];
            tile.finish({ b64_json: "", image_index: 0, seed: 7, lora });
            return [tile.picture.facts, tile.picture.settings.adapters];
        }"""
    )
    assert adapters == ["16 × 16 · seed 7 · ink at\u00a01", []]


def test_a_reload_begins_anew_as_with_every_setting(menu: Locator, page: Page):
    choose(menu, "sepia")
    page.locator("#steps").fill("4")
    page.reload()
    expect(page.locator("#adapters")).to_be_visible()
    expect(page.locator(".adapter")).to_have_count(0)
    expect(page.locator("#steps")).to_have_value("8")


def test_the_list_is_asked_for_whenever_the_menu_is_opened(
    offered: list, menu: Locator, page: Page
):
    menu.locator("summary").click()
    offered[:] = [MORE[0]]
    menu.locator("summary").click()
    expect(options(menu)).to_have_text(["style-0"])


class TestGone:
    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 400", "net::ERR_FAILED"]

    def test_the_server_says_so_and_it_can_be_removed(
        self, script: Script, menu: Locator, page: Page
    ):
        choose(menu, "sepia")
        script.adapters = []
        assert sent(script, page) is not None
        said = "lora: adapter 'sepia' is not served here, nor is any other"
        expect(page.get_by_role("alert")).to_have_text(said)
        menu.locator("summary").click()
        menu.locator("summary").click()
        expect(menu.get_by_label("Add an adapter")).to_be_hidden()
        menu.get_by_role("button", name="Remove Everything in sepia").click()
        expect(menu).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()

    def test_without_an_answer_the_list_stays(self, menu: Locator, page: Page):
        page.route("**/v1/loras", lambda route: route.abort())
        with page.expect_event("requestfailed"):
            menu.get_by_label("Add an adapter").focus()
        expect(options(menu)).to_have_count(2)


def test_a_key_that_sees_none_has_no_menu(script: Script, menu: Locator, page: Page):
    page.locator("#more summary").click()
    script.adapters = []
    page.get_by_label("API key").fill("other")
    page.get_by_label("API key").press("Tab")
    expect(menu).to_be_hidden()
    script.adapters = [INK]
    page.get_by_label("API key").fill("")
    page.get_by_label("API key").press("Tab")
    expect(options(menu)).to_have_text(["acme/ink"])


def test_every_field_has_a_label_and_the_keyboard_is_enough(menu: Locator, page: Page):
    fields = "fields => fields.filter((field) => field.labels.length !== 1).length"
    menu.locator("summary").focus()
    keyboard = page.keyboard
    for key in ("Tab", "ArrowDown", "Tab", "Enter"):
        keyboard.press(key)
    expect(menu.locator(".adapter-label")).to_have_text("Everything in sepia")
    assert menu.locator(":is(input, select)").evaluate_all(fields) == 0
    expect(menu.get_by_role("slider", name="Scale of Everything in sepia")).to_be_focused()
    for key in ("ArrowLeft", "Tab", "Tab", "Enter"):
        keyboard.press(key)
    expect(page.locator("#prompt")).to_have_value("sepia tones")
    expect(menu.get_by_role("spinbutton")).to_have_value("0.75")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ([{"name": "nope"}], "is not served here"),
        ([{"name": "broken"}], "is not served here"),
        ([{"name": "sepia"}] * 2, "asked for twice"),
        ([{"name": one["name"]} for one in [SEPIA, *MORE]], "at most 4"),
        ([{"name": "sepia", "scale": 10.5}], "from -10 to 10"),
        ([{"name": "sepia", "scale": "1"}], "from -10 to 10"),
        ([{"name": "sepia", "weight": 1}], "a field that is unknown"),
    ],
)
def test_the_stand_in_refuses_what_the_server_would(
    offered: list, playground_url: str, lora: list, said: str
):
    offered += MORE
    body = {"prompt": "a fox", "n": 1, "size": "16x16", "output_format": "png", "lora": lora}
    response = httpx.post(f"{playground_url}v1/images/generations", json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
