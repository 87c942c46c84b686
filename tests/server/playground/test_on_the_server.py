"""The page as the server itself serves it."""

import json

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.test_generating import finished, generate
from tests.server.serving import serve

KEY = "sk-playground-0123456789"


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
