"""A second start is one on precompiled files, also where PYTHONDONTWRITEBYTECODE is set."""

from pathlib import Path

import pytest

from tests.bytecode import NOT_SET, SET, before_the_first_line, kept
from tests.server.serving import serve


@pytest.mark.slow
def test_a_start_leaves_the_next_one_nothing_to_compile(demo_model, tmp_path):
    prefix = tmp_path / "kept"

    def start(variables: dict[str, str], name: str) -> set[Path]:
        environment = {**variables, "PYTHONPYCACHEPREFIX": str(prefix)}
        flags = ["--model-path", str(demo_model)]
        with serve(tmp_path / name, *flags, timeout_s=600, environment=environment) as running:
            assert running.post(prompt="x", size="64x64").status_code == 200
        return kept(prefix)

    first = start(SET, "first")
    # SGLang's and torch's are there: what the engine's process has compiled, not only the server's.
    packages = {part for file in first for part in file.parts}
    assert {"sglang", "torch", "diffusers", "uvicorn"} <= packages
    # This start keeps whatever it has to compile: on precompiled files nothing.
    again = start(NOT_SET, "second") - first
    assert again <= before_the_first_line(tmp_path / "before"), sorted(map(str, again))
