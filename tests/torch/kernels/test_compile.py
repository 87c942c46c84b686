"""Every kernel compiles for each kind of GPU at the released model's sizes, and keeps to what a
processor of it has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Resources = dict[str, dict[str, Any]]
"""Resources of each kernel on each target, by "kernel on sm_90"."""


@pytest.fixture(
    scope="module",
    params=[
        # Hopper, which is measured; the others take a minute.
        pytest.param((90,), id="sm_90"),
        pytest.param((80, 89, 100, 120), id="sm_80,89,100,120", marks=pytest.mark.slow),
    ],
)
def resources(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Resources:
    # By Triton's own assembler: SGLang, where tests of it have run in this process, names another.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = [sys.executable, "-m", "tests.torch.kernels.compile_for_targets", "--target"]
    done = subprocess.run(
        [*program, *map(str, request.param)],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(map(str, request.param))
    return {
        f"{name} on sm_{target}": values
        for target, kernels in found.items()
        for name, values in kernels.items()
    }


def test_every_kernel_is_there(resources):
    kernels = {name.partition(" on ")[0] for name in resources}
    assert len(kernels) >= 19
    for format in ("fp8", "int8"):
        for kernel in ("norm", "gated norm", "sigmoid gate", "silu mul", "quantize"):
            assert {f"{kernel} {format}", f"{kernel} {format} rotated"} <= kernels
    assert {name for name in resources if "fp8" in name and "sm_80" in name} == set()


def test_no_kernel_spills(resources):
    assert {name: r for name, r in resources.items() if r["spilled_bytes"]} == {}


def test_every_kernel_fits_into_the_shared_memory_of_a_block(resources):
    too_much = {name: r for name, r in resources.items() if r["shared_bytes"] > r["shared_limit"]}
    assert too_much == {}


def test_every_kernel_loads_16_bytes_at_a_time(resources):
    assert {name: r for name, r in resources.items() if not r["wide_loads"]} == {}


def on_tensor_cores(name: str) -> bool:
    return any(word in name for word in ("product", "attention", "lora"))


def test_products_attention_and_adapters_run_on_the_newest_tensor_cores(resources):
    kernels = {name: r for name, r in resources.items() if on_tensor_cores(name)}
    assert len(kernels) >= 2 + 2 + 2
    for name, found in kernels.items():
        newest = {"90": "wgmma", "100": "tcgen05"}.get(name.rpartition("_")[2], "mma")
        assert newest in found["tensor_cores"], name


def test_products_of_int8_are_summed_as_whole_numbers_by_the_tensor_cores(resources):
    kernels = {name for name in resources if "product int8" in name}
    assert {name.partition(" on ")[0] for name in kernels} == {
        "product int8",
        "swiglu product int8",
    }
    assert {name for name, r in resources.items() if r["int8_sums"]} == kernels


def test_a_processor_holds_enough_warps_of_every_kernel(resources):
    # It has 65,536 registers; with fewer than 16 warps nothing hides the loads, except in products,
    # also those of adapters, and attention, which load several steps ahead.
    held = {
        name: 65536 // (found["registers"] * 32 * found["warps"]) * found["warps"]
        for name, found in resources.items()
    }
    least = {name: 8 if on_tensor_cores(name) else 16 for name in held}
    assert {name: warps for name, warps in held.items() if warps < least[name]} == {}
