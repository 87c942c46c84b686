"""Phones, contrast and motion; and pictures of the page for whoever wants to look."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.stand_in import Script, adapter
from tests.server.playground.test_generating import finished, generate

DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 360, "height": 740}
PROMPT = "layered hills at dusk, a low sun behind haze, flat shapes, screen print"
LONG_WORD = "incomprehensibilities" * 12
ADAPTERS = [
    adapter("acme/ink"),
    adapter("sepia", title="Everything in sepia", trigger_words=["dusk", "sepia tones"]),
    adapter(
        "long",
        title=" ".join(["A title that nobody has shortened"] * 3),
        trigger_words=["in the style of nobody", LONG_WORD[:200], "flat shapes", "xyz"],
        default_scale=-0.35,
    ),
]

# WCAG 2: text in a colour on the first ground behind it that is not transparent.
LOW_CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const parse = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.map((value) => {
            const part = value / 255;
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (let node = element; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const isField = element.matches("input, select, textarea");
        if (!(own || isField) || !element.checkVisibility() || element.disabled) continue;
        if (element.ariaDisabled === "true") continue;
        const text = luminance(parse(getComputedStyle(element).color));
        const behind = luminance(ground(element));
        const [dark, light] = [text, behind].sort((a, b) => a - b);
        const ratio = (light + 0.05) / (dark + 0.05);
        if (ratio < 4.5) low.push([element.outerHTML.slice(0, 80), ratio]);
    }
    return low;
}"""


def fill_page(script: Script, page: Page) -> None:
    """Three finished pictures, a request being generated, one in the queue, and an error."""
    page.locator("#size").select_option("512x512")
    generate(page, PROMPT, count="2", seed="14")
    expect(finished(page)).to_have_count(2)
    page.locator("#size").select_option("768x512")
    generate(page, "the same hills in the morning", count="1", seed="3")
    expect(finished(page)).to_have_count(3)
    script.hold_at = {6}
    page.locator("#size").select_option("512x512")
    generate(page, "a lighthouse on a cliff, gouache", count="2", seed="42")
    expect(page.locator(".progress-text")).to_have_text(["step 6 of 8"] * 2)
    script.hold_at, script.ahead = {0, 6}, 3
    generate(page, "a quiet harbour at night", count="1", seed="17")
    expect(page.locator(".job-state").nth(1)).to_have_text("waiting, 3 ahead")
    page.evaluate("Promise.all([...document.images].map((i) => i.src && i.decode()))")


def choose_adapters(page: Page) -> None:
    page.locator("#prompt").fill(PROMPT)
    page.locator("#adapters summary").click()
    for name in ("sepia", "long"):
        page.get_by_label("Add an adapter").select_option(name)
        page.get_by_role("button", name="Add", exact=True).click()


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize(
    "context_options",
    [
        pytest.param({"viewport": DESKTOP, "color_scheme": "light"}, id="light"),
        pytest.param(
            {"viewport": DESKTOP, "color_scheme": "dark"}, id="dark", marks=pytest.mark.slow
        ),
        pytest.param({"viewport": PHONE, "color_scheme": "dark", "has_touch": True}, id="phone"),
    ],
)
class TestLooks:
    @pytest.mark.slow
    def test_contrast_and_width_are_right_in_every_state(
        self, script: Script, page: Page, artefacts: Path, request: pytest.FixtureRequest
    ):
        name = request.node.callspec.id

        def look(state: str) -> None:
            page.screenshot(path=artefacts / f"playground-{name}-{state}.png")
            assert page.evaluate(LOW_CONTRASTS) == []
            assert overflow(page) <= 0

        script.adapters = ADAPTERS
        page.reload()
        page.locator("#adapters").wait_for()
        look("empty")
        choose_adapters(page)
        look("adapters")
        fill_page(script, page)
        look("generating")
        script.hold_at = set()
        expect(finished(page)).to_have_count(6)
        page.evaluate("Promise.all([...document.images].map((i) => i.src && i.decode()))")
        page.locator("#more summary").click()
        look("finished")
        finished(page).nth(1).locator(".open").click()
        page.locator("#viewer-image").evaluate("image => image.decode()")
        look("viewer")
        page.keyboard.press("Escape")
        script.refusal = (400, f"prompt: {LONG_WORD}", {})
        page.locator("#size").select_option("custom")
        page.locator("#prompt").fill(LONG_WORD)
        page.locator("#generate").click()
        page.get_by_role("alert").get_by_text("incomprehensibilities").wait_for()
        look("error")

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 400"]


@pytest.mark.slow
@pytest.mark.parametrize("context_options", [{"color_scheme": "light"}])
def test_dark_and_light_differ(page: Page):
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


@pytest.mark.parametrize("context_options", [{"reduced_motion": "no-preference"}])
def test_nothing_moves_for_those_who_want_no_motion(script: Script, page: Page):
    script.hold_at = {0}
    generate(page, "a fox")
    page.locator(".tile").wait_for()
    assert page.evaluate("document.getAnimations().length") > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0


def test_focus_can_be_seen(page: Page):
    for _ in range(8):
        page.keyboard.press("Tab")
        style = "getComputedStyle(document.activeElement).outline"
        assert "solid 2px" in page.evaluate(style), page.evaluate(
            "document.activeElement.outerHTML"
        )


@pytest.mark.parametrize("context_options", [{"viewport": {"width": 1280, "height": 600}}])
class TestLowWindow:
    def test_stop_and_errors_are_in_sight(self, script: Script, page: Page):
        page.locator("#more summary").click()
        script.hold_at = {0}
        generate(page, "a fox")
        expect(page.get_by_role("button", name="Stop")).to_be_in_viewport(ratio=1)
        script.refusal = (400, "not like this", {})
        generate(page, "a hen")
        expect(page.get_by_role("alert")).to_have_text("not like this")
        expect(page.get_by_role("alert")).to_be_in_viewport(ratio=1)

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 400"]


def test_every_field_has_a_label(page: Page):
    page.locator("#more summary").click()
    page.locator("#size").select_option("custom")
    unlabelled = page.locator("#form :is(input, select, textarea)").evaluate_all(
        "fields => fields.filter((field) => field.labels.length !== 1).map((field) => field.id)"
    )
    assert unlabelled == []
