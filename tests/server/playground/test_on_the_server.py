"""The page as the server itself serves it."""

import json

import pytest
from playwright.sync_api import Page, expect

from krea2_srt.request import AdapterChoice
from krea2_srt.testing.fake_engine import ADAPTERS
from tests.server.playground.test_adapters import choose, options
from tests.server.playground.test_generating import finished, generate
from tests.server.serving import serve

KEY, BLIND_KEY = "sk-playground-0123456789", "sk-sees-nothing-0123456789"
KEYS = f"""
keys:
  - {{name: page, key: {KEY}}}
  - {{name: blind, key: {BLIND_KEY}, adapters: []}}
"""


@pytest.fixture
def engine(engine):
    """The engine of these servers, with adapters."""
    engine.adapters |= {info.name: info for info in ADAPTERS}
    return engine


class TestKeys:
    @pytest.fixture
    def playground_url(self, shared_engine, tmp_path):
        flags = ["--engine-endpoints", shared_engine.endpoint]
        with serve(tmp_path, *flags, environment={"KREA2_SERVE_API_KEYS": KEY}) as server:
            yield f"{server.url}/"

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 401"]

    @pytest.mark.slow
    def test_a_key_is_asked_for_and_used(self, blank_page: Page, playground_url: str):
        blank_page.goto(playground_url)
        expect(blank_page.get_by_label("API key")).to_be_focused()
        blank_page.get_by_label("API key").fill(KEY)
        blank_page.locator("#size").select_option("256x256")
        generate(blank_page, "a fox")
        expect(finished(blank_page)).to_have_count(1)


class TestAdapters:
    @pytest.fixture
    def playground_url(self, engine, fake_server):
        return f"{fake_server.url}/"

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 400"]

    def test_one_is_used_until_it_has_gone(self, engine, page: Page):
        menu = page.locator("#adapters")
        menu.locator("summary").click()
        expect(options(menu)).to_have_text(["acme/ink", "Everything in sepia"])
        choose(menu, "sepia")
        page.locator("#size").select_option("256x256")
        generate(page, "a fox", seed="5")
        facts = "256 × 256 · seed 5 · 8 steps · sepia at 0.8"
        expect(finished(page).locator(".facts")).to_have_text(facts)
        assert engine.requests[-1].adapters == {AdapterChoice("sepia", 0.8)}
        del engine.adapters["sepia"]
        page.locator("#generate").click()
        said = "lora: adapter 'sepia' is not served here; acme/ink is"
        expect(page.get_by_role("alert")).to_have_text(said)


class TestAdaptersOfKeys:
    @pytest.fixture
    def playground_url(self, shared_engine, tmp_path):
        (tmp_path / "keys.yaml").write_text(KEYS)
        flags = ["--engine-endpoints", shared_engine.endpoint]
        flags += ["--api-keys-file", str(tmp_path / "keys.yaml")]
        with serve(tmp_path, *flags) as server:
            yield f"{server.url}/"

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 401"]

    @pytest.mark.slow
    def test_a_key_is_offered_what_it_may_use(self, engine, blank_page: Page, playground_url: str):
        blank_page.goto(playground_url)
        menu, key = blank_page.locator("#adapters"), blank_page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(menu).to_be_hidden()
        key.fill(KEY)
        key.press("Tab")
        expect(menu).to_be_visible()
        key.fill(BLIND_KEY)
        key.press("Tab")
        expect(menu).to_be_hidden()


class TestLoading:
    @pytest.fixture
    def playground_url(self, tmp_path):
        # Nobody is there, and the server waits for somebody.
        flags = ["--engine-endpoints", "tcp://127.0.0.1:9"]
        with serve(tmp_path, *flags, ready=False) as server:
            yield f"{server.url}/"

    @pytest.fixture
    def expected_errors(self) -> list[str]:
        return ["status of 503"]

    @pytest.mark.slow
    def test_the_page_says_that_the_model_is_loading(self, blank_page: Page, playground_url: str):
        blank_page.goto(playground_url)
        expect(blank_page.locator("#server")).to_have_text("the model is loading")
        ready = blank_page.request.get(f"{playground_url}ready")
        assert ready.status == 503
        assert json.loads(ready.text())["error"]["code"] == "engine_unavailable"
