"""What docs/clients.md says of each client's body is what comes of it."""

import json
import re
from pathlib import Path

import pytest

from krea2_server.api.parameters import resolve
from krea2_server.errors import ApiError
from krea2_server.model_names import ModelNames
from krea2_server.settings import Settings
from krea2_srt.testing.fake_engine import MODEL
from tests.unit.server.test_dialects import read_body

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/clients.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \| ([^|]+) \|$", PAGE, re.MULTILINE)
RUN = PAGE.split("## Clients run for real")[1].split("\n## ")[0]
VERSIONS = re.findall(r"^\| ([^|]+) \| (?:[\w-]+ )?(\d+\.\d+\.\d+) \|", RUN, re.MULTILINE)
CLIENTS = ROOT / "tests/server/clients"


def test_there_are_rows():
    assert len(ROWS) >= 25


@pytest.mark.parametrize(("client", "body", "answer"), ROWS, ids=[row[0] for row in ROWS])
def test_a_clients_body_gets_what_the_page_says(client, body, answer):
    kind, *_ = answer.split()
    fields = re.findall(r"`(\w+)`", answer)
    if kind == "refuses":
        with pytest.raises(ApiError) as refused:
            read_body(json.loads(body))
        assert [refused.value.param] == fields
        return
    request = read_body(json.loads(body))
    resolve(request, "id", MODEL, max_n=10, max_prompt=32_000)
    assert sorted(warning.split(":")[0] for warning in request.warnings) == sorted(fields)
    assert kind == ("names" if fields else "image")


def test_any_name_without_a_colon_is_served_where_the_page_says_so():
    names = ModelNames.of(Settings(model_aliases=["*"]), None)
    for _, body, _ in ROWS:
        assert names.serves(json.loads(body).get("model", "krea-2-turbo"))
    assert not names.serves("krea-2-turbo:my-adapter")


def test_the_versions_on_the_page_are_those_that_are_run():
    packages = json.loads((CLIENTS / "node/package-lock.json").read_text())["packages"]
    node = {name.removeprefix("node_modules/"): it.get("version") for name, it in packages.items()}
    requirements = (CLIENTS / "python/requirements.lock").read_text()
    python = dict(re.findall(r"^([\w-]+)==(\S+)", requirements, re.MULTILINE))
    locked = {
        "openai-node": node["openai"],
        "Vercel's ai": node["ai"],
        "@ai-sdk/openai": node["@ai-sdk/openai"],
        "@ai-sdk/openai-compatible": node["@ai-sdk/openai-compatible"],
        "LiteLLM, its proxy": python["litellm"],
        "LiteLLM, its function": python["litellm"],
        "LangChain's `DallEAPIWrapper`": python["langchain-community"],
    }
    assert dict(VERSIONS) == locked


@pytest.mark.parametrize("file", ["node/package-lock.json", "python/requirements.lock"])
def test_locks_of_clients_name_no_registry(file):
    """What is installed is what was locked, whatever registry serves it."""
    lock = (CLIENTS / file).read_text()
    assert re.findall(r'^ *"resolved"|^-|"(?:git|file|https?)[^"]*\.tgz"', lock, re.MULTILINE) == []
    assert set(re.findall(r"https?://[^/\s]+", lock)) <= {"https://github.com"}  # of a sponsor
