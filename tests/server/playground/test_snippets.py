"""Copied commands and programs do what the form would, whatever is in it."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.playground.stand_in import Script

HOSTILE = 'it\'s "quoted" $HOME `id` $(id) \\n 100% !x\nsecond line\ttab — 狐 🦊 {x} #'
KEY = "secret-7"


@pytest.fixture
def context_options() -> dict:
    return {"permissions": ["clipboard-read", "clipboard-write"]}


def fill(page: Page, **fields: str) -> None:
    page.locator("#more summary").click()
    page.locator("#size").select_option("256x256")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)


def copy(page: Page, what: str) -> str:
    page.get_by_role("button", name=f"Copy as {what}").click()
    expect(page.locator("#status")).to_have_text(f"Copied as {what}.")
    return page.evaluate("navigator.clipboard.readText()")


@pytest.mark.parametrize("count", ["1", "3"])
def test_curl_is_given_exactly_the_form(
    page: Page, playground_url: str, tmp_path: Path, count: str
):
    fill(page, prompt=HOSTILE, count=count, seed="7", guidance="2", negative=HOSTILE, key=KEY)
    command = copy(page, "curl")
    assert KEY not in command
    # The shell that reads it is a real one; only what it would start is ours.
    script = "curl() { printf '%s\\0' \"$@\" > arguments; }; jq() { :; }\n" + command
    environment = {**os.environ, "KREA2_API_KEY": KEY}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    arguments = (tmp_path / "arguments").read_text().split("\0")
    assert arguments[:2] == ["-sS", f"{playground_url}v1/images/generations"]
    headers = [after for flag, after in pairwise(arguments) if flag == "-H"]
    assert headers == [f"Authorization: Bearer {KEY}", "Content-Type: application/json"]
    assert json.loads(arguments[arguments.index("-d") + 1]) == {
        "model": "krea-2-turbo",
        "prompt": HOSTILE,
        "n": int(count),
        "size": "256x256",
        "output_format": "png",
        "seed": 7,
        "num_inference_steps": 8,
        "guidance_scale": 2,
        "negative_prompt": HOSTILE,
    }


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
@pytest.mark.parametrize(
    ("count", "names"), [("1", ["krea2.png"]), ("2", ["krea2-0.png", "krea2-1.png"])]
)
@pytest.mark.slow
def test_curl_writes_the_pictures(
    script: Script, page: Page, tmp_path: Path, count: str, names: list[str]
):
    fill(page, prompt=HOSTILE, count=count)
    command = copy(page, "curl")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == names
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in names)
    script.refusal = (400, "that is not allowed", {})
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert "that is not allowed" in process.stderr


@pytest.mark.slow
def test_the_program_generates_with_the_official_client(script: Script, page: Page, tmp_path: Path):
    fill(page, prompt=HOSTILE, count="2", seed=str(2**63 - 1), key=KEY)
    program = copy(page, "Python")
    assert KEY not in program
    compile(program, "copied.py", "exec")
    script.key = KEY
    environment = {**os.environ, "KREA2_API_KEY": KEY}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert [body["prompt"] for body in script.bodies] == [HOSTILE]
    assert script.bodies[0]["seed"] == 2**63 - 1
    assert script.bodies[0]["num_inference_steps"] == 8
    assert (tmp_path / "krea2-1.png").read_bytes()[1:4] == b"PNG"


def test_without_key_or_own_fields_the_program_compiles_too(page: Page):
    fill(page, prompt="a fox", steps="", guidance="")
    program = copy(page, "Python")
    compile(program, "copied.py", "exec")
    assert "extra_body" not in program
    assert 'api_key="none"' in program


@pytest.mark.slow
def test_where_the_clipboard_is_forbidden_the_text_is_shown(page: Page):
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }"
    )
    fill(page, prompt="a fox")
    page.get_by_role("button", name="Copy as curl").click()
    text = page.locator("#copy-text")
    expect(text).to_be_focused()
    assert text.input_value().startswith("curl ")
    assert text.evaluate("field => field.selectionEnd - field.selectionStart") > 100
    page.get_by_role("button", name="Close").click()
    expect(text).to_be_hidden()
