"""The GPU benchmark where nothing is installed but what it asks for: no SGLang, and not itself."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from krea2_bench.gpu.parts import PARTS
from krea2_bench.gpu.rows import LEFT_OUT

ROOT = Path(gpu.__file__).parents[1]
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "safetensors", "numpy")
"""Packages of a bare machine with a GPU."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_PARENT = """
import os, torch
asked, original = [], torch._C._cuda_getDeviceCount
torch._C._cuda_getDeviceCount = lambda: (asked.append(1), original())[1]
from krea2_bench.gpu import command
print(len(os.listdir("/proc/self/task")), len(asked))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with those packages alone: a download of three gigabytes."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    found = folder / "bin" / "python"
    command = [found, "-m", "pip", "install", "--quiet", "--no-cache-dir", *PACKAGES]
    subprocess.run(command, check=True, timeout=3000)
    yield found
    shutil.rmtree(folder)


def run(python: Path, folder: Path, *arguments: str | Path, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    found = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env=environment,
        timeout=1500,
        capture_output=True,
        text=True,
    )
    # With the table, which says what failed.
    assert found.returncode == 0, found.stderr + found.stdout
    return found.stdout


def test_the_parent_has_one_thread_and_asks_cuda_nothing(python, tmp_path):
    packages = str(ROOT / "benchmarks")
    told = run(python, tmp_path, "-c", _PARENT, PYTHONPATH=packages, **ONE_THREAD)
    assert told.split() == ["1", "0"]


def test_a_trial_runs_on_a_bare_machine(python, tmp_path):
    script = ROOT / "benchmarks" / "gpu.py"
    run(python, tmp_path, script, "--smoke", OUT=str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert stored["done"] == list(PARTS)
    assert {missing["why"] for missing in stored["missing"]} == {LEFT_OUT}
    assert stored["machine"]["torch"].startswith("2.11.0")
    assert stored["machine"]["triton"] == "3.6.0"
