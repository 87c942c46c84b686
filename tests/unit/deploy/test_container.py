"""The image, as far as it can be tested without an engine that builds it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from krea2_server import health
from krea2_server.settings import load_settings
from krea2_srt.cli import compile_bytecode
from tests import image
from tests.image import DOCKERFILE

ROOT = Path(__file__).parents[3]
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


def test_its_variables_are_settings_and_it_serves_nobody_without_a_key(monkeypatch):
    names = {name: it for name, it in image.variables().items() if "KREA2_SERVE_" in name}
    assert "KREA2_SERVE_MODEL_PATH=${MODEL} " in DOCKERFILE
    for name, value in {**names, "KREA2_SERVE_MODEL_PATH": "krea/Krea-2-Turbo"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="there are no API keys"):
        load_settings([])
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-0123456789abcdef")
    assert load_settings([]).host == "0.0.0.0"
    # Where its health check, which reads no settings, looks for the address.
    assert str(load_settings([]).address_file) == names[health.VARIABLE]


def test_it_runs_as_nobody_special_of_the_group_that_may_write():
    assert re.search(r"^USER 10001:0$", DOCKERFILE, re.M)
    assert {"--owner=10001", "--group=0", "--mode=2775"} <= set(image.cache_made_by())
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


def test_what_it_is_started_with_becomes_the_servers_flags_and_signals_reach_it(tmp_path):
    """The server takes the place of the shell."""
    stand_in = tmp_path / "krea2-serve"
    stand_in.write_text('#!/bin/sh\necho $$ "$@"; umask\n')
    stand_in.chmod(0o755)
    flags = ["--port", "8080", "--served-model-name", "two words"]
    process = subprocess.Popen(
        [*image.command("ENTRYPOINT"), *flags],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = process.communicate()
    assert said == f"{process.pid} {' '.join(flags)}\n0002\n"


def test_prove_sh_starts_the_server_as_the_image_does():
    _, flag, script, name = image.command("ENTRYPOINT")
    proof = (INSTALL.parent / "prove.sh").read_text()
    subprocess.run(["bash", "-n", INSTALL.parent / "prove.sh"], check=True)
    assert f"/bin/sh {flag} '{script}' {name} " in proof
    assert " ".join(image.command("CMD")) in proof


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
