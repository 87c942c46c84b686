"""Commands keep bytecode whatever the environment says; tests/e2e has it of a whole start."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.bytecode import NOT_SET, SET, before_the_first_line, kept

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
AT_THE_END = """
import atexit, os, sys
name = "PYTHONDONTWRITEBYTECODE"
atexit.register(lambda: print(f"\\n{sys.dont_write_bytecode} {os.environ.get(name)}"))
"""


def called(script: str) -> str:
    """What is in a command's file."""
    module, function = SCRIPTS[script].split(":")
    return f"from {module} import {function}; {function}()"


def last_line(code: str, *arguments: str) -> str:
    """The last line of a process in whose environment the variable is set."""
    command = [sys.executable, "-c", AT_THE_END + code, *arguments]
    environment = {**os.environ, **SET}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_without_us_python_keeps_none():
    assert last_line("") == "True 1"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_command_keeps_bytecode_and_so_do_those_that_it_starts(script):
    assert last_line(called(script), "--help") == "False None"


def test_so_do_rays_replicas_which_no_command_of_ours_starts():
    assert last_line("import krea2_server.ray") == "False None"


def test_krea2_serve_keeps_that_of_all_it_imports(tmp_path):
    """The second run keeps whatever it has to compile, so what is new is what the first did not."""
    prefix = tmp_path / "kept"

    def serve(variables: dict[str, str]) -> set[Path]:
        subprocess.run(
            [sys.executable, "-c", called("krea2-serve"), "--help"],
            env={**os.environ, **variables, "PYTHONPYCACHEPREFIX": str(prefix)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return kept(prefix)

    first = serve(SET)
    assert {"uvicorn", "pydantic", "krea2_srt"} <= {file.parent.name for file in first}
    assert serve(NOT_SET) - first <= before_the_first_line(tmp_path / "before")
