"""The version is in one place, and every command prints it."""

import re
from pathlib import Path

import pytest

from krea2_bench.cli import main as bench
from krea2_server.cli import main as serve
from krea2_srt import __version__
from krea2_srt.cli.convert import main as convert
from krea2_srt.cli.demo_model import main as demo_model
from krea2_srt.cli.generate import main as generate

COMMANDS = {
    "krea2-serve": serve,
    "krea2-generate": generate,
    "krea2-convert": convert,
    "krea2-demo-model": demo_model,
    "krea2-bench": bench,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_it(name, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize(
    "file", ["kubernetes/overlays/gpu/kustomization.yaml", "ray/rayservice.yaml"]
)
def test_manifests_name_the_image_of_this_version(file):
    text = (Path(__file__).parents[2] / "deploy" / file).read_text()
    tags = re.findall(r"krea2-srt:([\w.]+)", text) + re.findall(r'newTag: "([^"]+)"', text)
    assert tags == [__version__]
