"""Every kernel compiles for Hopper at the released model's sizes, and keeps to its registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_hopper"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_no_kernel_spills(resources):
    assert len(resources) >= 16
    assert {name: r for name, r in resources.items() if r["spilled_bytes"]} == {}


def test_every_kernel_loads_16_bytes_at_a_time(resources):
    assert {name: r for name, r in resources.items() if not r["wide_loads"]} == {}


def test_a_processor_holds_enough_warps_of_every_kernel(resources):
    # It has 65,536 registers; with fewer than 16 warps nothing hides the loads.
    held = {
        name: 65536 // (found["registers"] * 32 * found["warps"]) * found["warps"]
        for name, found in resources.items()
    }
    assert {name: warps for name, warps in held.items() if warps < 16} == {}
