""".ci/run, on a `make` that does as told."""

import os
import re
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
STAGES = ["set-up", "make lint", "make bench-check", "make test", "make test-slow"]


def run(folder: Path, make: str) -> tuple[int, list[str], str]:
    """Exit code, the stages of the table at the end, and what make has been asked for.

    Args:
        make: what it does, in bash.
    """
    there = ("chromium", "prometheus", "promtool", "faketime", "ip", "nginx")
    for name, script in {"make": make, **dict.fromkeys(there, "exit 1")}.items():
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["bash", RUN], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    table = re.findall(r"^ +\d+ s  (.+)$", done.stdout, re.M)
    return done.returncode, table, done.stdout


def test_it_says_what_each_stage_took(tmp_path):
    code, table, output = run(tmp_path, 'echo "$@: ${PYTHONDONTWRITEBYTECODE-kept}"')
    assert (code, table) == (0, STAGES)
    for target in ("install", "lint", "bench-check", "test", "test-slow"):
        assert f"{target}: kept\n" in output


@pytest.mark.parametrize(
    ("target", "stages"),
    [
        ("install", ["set-up, failed"]),
        ("test", [*STAGES[:-2], "make test, failed"]),
        ("test-slow", [*STAGES[:-1], "make test-slow, failed"]),
    ],
)
def test_also_when_one_fails_and_none_follows(tmp_path, target, stages):
    code, table, _ = run(tmp_path, f"[[ $1 != {target} ]] || exit 7")
    assert (code, table) == (7, stages)
