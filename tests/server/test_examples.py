"""The examples, run as their first lines say, against the real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("openai_client", ["image_0.png", "image_1.png"]),
        ("stream", ["preview_0.png", "preview_1.png", "image.png"]),
    ],
)
def test_clients(fake_server, tmp_path, name, files):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "a red fox"],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_BASE_URL": f"{fake_server.url}/v1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == files
    for file in files:
        Image.open(tmp_path / file).load()


def test_sglangs_command_is_the_readmes():
    script = (ROOT / "examples" / "sglang_generate.sh").read_text()
    command = script[script.index("sglang generate") :]
    for variable, value in (
        ('"${1:-krea/Krea-2-Turbo}"', "krea/Krea-2-Turbo"),
        ('"${2:-', '"'),
        ('photorealistic}"', 'photorealistic"'),
    ):
        assert variable in command
        command = command.replace(variable, value)
    readme = (ROOT / "README.md").read_text()
    assert " ".join(command.split()) in " ".join(readme.split())
