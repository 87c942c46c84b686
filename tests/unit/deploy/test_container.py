"""The image, as far as it can be tested without an engine that builds it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from krea2_server.settings import load_settings
from krea2_srt.cli import compile_bytecode

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALL = ROOT / "deploy" / "docker" / "install.sh"


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_it_begins_with_the_pinned_sglang():
    (sglang,) = [it for it in PROJECT["project"]["dependencies"] if it.startswith("sglang")]
    pinned = sglang.removeprefix("sglang[diffusion]==")
    assert f"ARG BASE=lmsysorg/sglang:v{pinned}\n" in DOCKERFILE


def test_its_variables_are_settings_and_it_serves_nobody_without_a_key(monkeypatch, capsys):
    names = dict(re.findall(r"(KREA2_SERVE_\w+)=(\S+)", DOCKERFILE))
    assert names
    for name, value in names.items():
        monkeypatch.setenv(name, value.replace("${MODEL}", "krea/Krea-2-Turbo"))
    with pytest.raises(Exception, match="there are no API keys"):
        load_settings([])
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-0123456789abcdef")
    assert load_settings([]).host == "0.0.0.0"


def test_it_runs_as_nobody_special_passes_signals_and_is_asked_for_its_health():
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.M)
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    assert json.loads(entry) == ["krea2-serve"]
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    (command,) = re.findall(r"^  CMD (\[.+\])$", DOCKERFILE, re.M)
    program, flag, code = json.loads(command)
    assert (program, flag) == ("python3", "-c")
    compile(code, "healthcheck", "exec")
    assert "/health" in code


def test_the_context_has_what_the_wheel_is_made_of():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    assert all((ROOT / name).exists() for name in kept)
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {name.split("/")[0] for name in packages} <= set(kept)


def test_the_install_script_is_sound():
    subprocess.run(["bash", "-n", INSTALL], check=True)
    result = subprocess.run(
        ["bash", INSTALL, "tpu", "/nowhere", ROOT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "tpu: must be gpu or cpu" in result.stderr


@pytest.fixture
def compiler(monkeypatch):
    """The script that compiles, here into __pycache__, as in an image."""
    monkeypatch.setattr(sys, "pycache_prefix", None)
    return compile_bytecode


def test_it_carries_the_bytecode_of_all_that_can_be_imported(compiler, tmp_path, monkeypatch):
    site, package = tmp_path / "site", tmp_path / "site" / "carried"
    for folder in (package, package / "deep", package / "tests"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (site / "template.py").write_text("{{ this is no Python }}")
    compiler.compile_all([str(tmp_path / "python311.zip"), str(site)])
    assert {file.parents[1] for file in site.rglob("*.pyc")} == {package, package / "deep"}
    # Python takes it for the sources', and the script for what it says.
    monkeypatch.syspath_prepend(site)
    assert compiler.without_bytecode(["carried", "carried.deep"]) == []
    missing = ["carried.tests", "template", "nowhere"]
    assert compiler.without_bytecode(missing) == missing
    assert compiler.folder_of("carried") == [str(package)]
    assert compiler.folder_of("nowhere") == []


def test_both_images_are_compiled_at_the_end_and_none_says_that_there_be_no_bytecode():
    script = INSTALL.read_text()
    assert script.endswith('esac\n\n"$python" -m krea2_srt.cli.compile_bytecode\n')
    for target in ("gpu", "cpu"):
        (steps,) = re.findall(rf"^  {target}\)$(.+?)^    ;;$", script, re.M | re.S)
        assert re.search(r"^    python=\S+$", steps, re.M)
    assert "PYTHONDONTWRITEBYTECODE" not in DOCKERFILE
