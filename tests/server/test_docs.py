"""What docs/server.md and docs/moderation.md say is what the code does."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

import krea2_server
from krea2_server.api.quality import PRESETS
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.keys import Keys
from krea2_server.moderation.policy import load_policy
from krea2_server.scheduler_settings import EngineSettings
from krea2_server.settings import Settings, load_settings
from krea2_srt.errors import KINDS, Krea2Error
from tests.unit.server.test_parameters import RAW, resolved

ROOT = Path(__file__).parents[2]
SERVER = (ROOT / "docs/server.md").read_text()
MODERATION = (ROOT / "docs/moderation.md").read_text()

# Functions that make errors -> which of their arguments is the code.
_MAKERS = {"ApiError": 2, "invalid": 2, "_unauthorized": 1}


def codes_in_use() -> set[str]:
    """All codes that the server's source has, and those of the engine's errors."""
    found = {kind.code for kind in (Krea2Error, *KINDS.values())}
    for file in Path(krea2_server.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = _MAKERS.get(node.func.id)
                if place is not None and len(node.args) > place:
                    found |= {
                        value.value
                        for value in ast.walk(node.args[place])
                        if isinstance(value, ast.Constant) and isinstance(value.value, str)
                    }
    return found


def test_every_error_code_is_explained():
    table = SERVER[SERVER.index("## Errors") : SERVER.index("## Keys")]
    explained = set(re.findall(r"`([a-z_]+)`", table))
    assert len(codes_in_use()) > 20
    assert codes_in_use() <= explained


def test_every_field_is_explained():
    table = SERVER[SERVER.index("| field |") : SERVER.index("`null` is as good")]
    assert ImageGenerationRequest.model_fields.keys() <= set(re.findall(r"`([a-z_]+)`", table))


@pytest.mark.parametrize("quality", PRESETS)
def test_the_table_of_qualities_is_true(quality):
    row = next(line for line in SERVER.splitlines() if re.match(rf"\| .*`{quality}`.*x", line))
    turbo, raw = resolved(quality=quality), resolved(RAW, quality=quality)
    assert f"| {turbo.image.steps} ({raw.image.steps}) | {turbo.image.size} |" in row


@pytest.mark.parametrize("text", [SERVER, MODERATION])
def test_flags_that_are_named_exist(text):
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z.-]+)", text)}
    known = {*Settings.model_fields, *(f"engine.{name}" for name in EngineSettings.model_fields)}
    assert flags - known - {"help", "no_playground"} == set()
    assert "max_n" in flags or text is MODERATION


def test_metrics_that_are_named_exist(fake_server, engine):
    fake_server.post(prompt="x", size="64x64")
    text = fake_server.get("/metrics").text
    for name in re.findall(r"`(krea2_[a-z_]+)", SERVER):
        # The moderator's are there where there is one.
        assert name in text or name.startswith("krea2_moderation"), name


def examples(text: str) -> list[str]:
    """Indented blocks."""
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


def test_the_example_of_a_policy_loads(tmp_path):
    (example,) = (block for block in examples(MODERATION) if block.startswith("checkers:"))
    (tmp_path / "policy.yaml").write_text(example)
    assert len(load_policy(tmp_path / "policy.yaml").checkers) == 3


def test_the_example_of_keys_loads(tmp_path):
    (example,) = (block for block in examples(SERVER) if block.startswith("keys:"))
    example = example.replace("sk-…", "sk-0123456789abcdef").replace("5c0d…", "5c0d" * 16)
    (tmp_path / "keys.yaml").write_text(example.replace(", or", ""))
    keys = Keys.from_settings(load_settings(["--api-keys-file", str(tmp_path / "keys.yaml")]))
    assert keys.client("Bearer sk-0123456789abcdef").name == "web"
