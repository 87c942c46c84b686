"""The wheel, in a fresh environment: what it installs, and that it serves the demo."""

import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from krea2_srt.testing.krea2_serve import Krea2Serve
from krea2_srt.testing.processes import installed

ROOT = Path(__file__).parents[2]
NAMES = {"krea2_srt", "krea2_server", "krea2_bench"}


def run(*command: object, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_it_installs_three_names_and_nothing_else(wheel):
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    tops = {file.parts[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == NAMES
    for name in NAMES:
        assert Path(name, "py.typed") in files
    for ending in ("safetensors", "yaml"):
        assert Path(f"krea2_srt/demo/sepia.{ending}") in files
    assert not [file for file in files if "results" in file.parts or "tests" in file.parts]
    assert [file for file in files if file.name == "LICENSE"]


@pytest.mark.slow
def test_in_a_fresh_environment_it_serves_the_demo(wheel, tmp_path):
    uv, environment = installed("uv"), tmp_path / "environment"
    python = environment / "bin" / "python"
    run(uv, "venv", "--python", sys.executable, environment)
    run(uv, "pip", "sync", "--python", python, "--require-hashes", ROOT / "requirements.lock")
    run(uv, "pip", "install", "--python", python, "--no-deps", wheel)
    model = tmp_path / "krea-2-demo"
    # From elsewhere: nothing may come from the sources beside us.
    run(environment / "bin" / "krea2-demo-model", model, folder=tmp_path)
    command = environment / "bin" / "krea2-serve"
    with Krea2Serve(
        tmp_path / "server", ["--model-path", str(model)], program=command, start_s=600
    ) as server:
        page = httpx.get(server.url, timeout=60)
        assert "playground" in page.text.lower()
        body = {"prompt": "a red circle on a white background", "size": "64x64"}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=600)
        assert answer.status_code == 200, answer.text
