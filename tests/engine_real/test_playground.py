"""The page as the server itself serves it, with the real engine behind it."""

import subprocess
import sys

import pytest
from playwright.sync_api import Page, expect

from tests.channel import wait_until
from tests.server.playground.test_generating import (
    finished,
    generate,
    test_a_prompt_and_enter_generate_a_picture_after_previews,
    test_several_images_have_seeds_that_count_up,
)

__all__ = [
    "test_a_prompt_and_enter_generate_a_picture_after_previews",
    "test_several_images_have_seeds_that_count_up",
]


@pytest.fixture
def playground_url(real_server) -> str:
    return f"{real_server.url}/"


@pytest.mark.slow
def test_what_it_looks_like(page: Page, artefacts):
    """Kept for whoever wants to look."""
    page.locator("#size").select_option("256x256")
    generate(page, "a red heart on a yellow background", count="3", seed="14")
    expect(finished(page)).to_have_count(3)
    page.evaluate("Promise.all([...document.images].map((i) => i.src && i.decode()))")
    page.screenshot(path=artefacts / "playground-real-server.png")


@pytest.mark.slow
def test_stop_frees_the_engine(page: Page, real_server):
    page.locator("#size").select_option("512x512")
    generate(page, "a fox", steps="150", count="2")
    expect(page.locator(".tile[data-state=generating]").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".tile")).to_have_count(0)
    wait_until(lambda: real_server.get("/v1/queue").json()["running"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "context_options", [{"permissions": ["clipboard-read", "clipboard-write"]}], ids=["clipboard"]
)
def test_the_python_that_it_copies_generates_the_same_picture(page: Page, tmp_path):
    page.locator("#size").select_option("256x256")
    page.locator("#seed").fill("5")
    page.locator("#prompt").fill('a "red" fox')
    page.locator("#copy-python").click()
    program = page.evaluate("navigator.clipboard.readText()")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
    page.locator("#generate").click()
    expect(finished(page)).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == (tmp_path / "krea2-0.png").read_bytes()
