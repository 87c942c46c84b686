"""krea2-bench quality --sensitivity: the rule, the measurement, and what the command writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from krea2_bench import quality
from krea2_bench.quality.cases import Case, CaseError
from krea2_bench.quality.sensitivity.measure import (
    Matrices,
    VelocityErrors,
    measure,
    steps_within,
    without,
)
from krea2_bench.quality.sensitivity.page import conclusion, page
from krea2_bench.quality.sensitivity.rule import MatrixError, candidates, kept
from krea2_srt.convert.convert import convert_to_folder
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.layers import Linear
from krea2_srt.model.quantization import Quantization, QuantizedLinear
from krea2_srt.runner.model_runner import Krea2Runner

RESULTS = Path(quality.__file__).parents[2] / "results"
INT8 = Quantization("int8", rotation=True)
CASES = [Case("a cat", 0, 64, 64, 2), Case("snow", 1, 64, 64, 2)]


def matrix(name: str, size: float, gain: float) -> MatrixError:
    return MatrixError(name, size, alone=gain, others=1 - gain, gain=gain)


def test_candidates_are_those_that_bring_most_for_their_bytes():
    matrices = [
        matrix("0.attn.out", 0.01, 0.02),
        matrix("1.attn.out", 0.01, 0.019),
        matrix("0.ff.down", 0.03, 0.30),
        matrix("1.ff.down", 0.03, 0.15),
        matrix("2.attn.out", 0.005, -0.10),
    ]
    # 1.ff.down has no room beside 0.ff.down; 1.attn.out brings too little.
    assert candidates(matrices) == ["0.ff.down", "0.attn.out"]
    assert candidates([matrix("0.ff.down", 0.051, 0.99)]) == []


def test_candidates_stay_if_together_they_bring_a_decibel():
    assert kept(["0.attn.out"], 0.99) == []
    assert kept(["0.attn.out", "1.attn.out"], 1.0) == ["0.attn.out", "1.attn.out"]


def test_steps_are_as_many_as_there_is_time_for():
    assert steps_within(100.0, 1.0, 8) == list(range(8))
    assert steps_within(2.5, 1.0, 8) == [2, 6]
    assert steps_within(1.0, 1.0, 8) == [4]
    with pytest.raises(
        CaseError, match=r"--budget-s: one step takes about 30 s, and 20 s are left"
    ):
        steps_within(20.0, 30.0, 8)
    with pytest.raises(CaseError, match=r"and 0 s are left"):
        steps_within(-40.0, 30.0, 8)


@pytest.fixture(scope="module")
def errors(demo_model: Path) -> VelocityErrors:
    # Not the shared one: its matrices are changed.
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    runner = Krea2Runner.load(checkpoint, torch.device("cpu"), torch.float32)
    return VelocityErrors(runner, CASES)


def test_nothing_quantised_is_no_error(errors: VelocityErrors):
    matrices = Matrices(errors.runner.dit, INT8)
    assert errors.mean_square() == 0
    matrices.quantize(matrices.sizes)
    assert errors.mean_square() > 0
    matrices.quantize(())
    assert errors.mean_square() == 0


def test_just_those_that_are_named_are_quantised(errors: VelocityErrors):
    matrices = Matrices(errors.runner.dit, INT8)
    assert sum(matrices.sizes.values()) == pytest.approx(1)
    matrices.quantize(["0.attn.out", "3.ff.down"])
    quantised = {
        name
        for name, module in errors.runner.dit.blocks.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    matrices.quantize(())
    assert quantised == {"0.attn.out", "3.ff.down"}
    assert not any(isinstance(module, QuantizedLinear) for module in errors.runner.dit.modules())


def test_a_matrix_that_is_spoilt_stands_first(errors: VelocityErrors):
    """A lone huge weight takes its row's scale, and the rest of the row rounds to nothing; without
    a rotation, which would spread it.
    """
    spoilt = errors.runner.dit.blocks[1].get_submodule("attn.out")
    assert isinstance(spoilt, Linear)
    before = spoilt.weight.clone()
    spoilt.weight[:, 0] = 50 * before.abs().max()
    try:
        matrices = Matrices(errors.runner.dit, Quantization("int8"))
        fresh = VelocityErrors(errors.runner, CASES)
        said: list[str] = []
        whole, found = measure(fresh, matrices, 1e6, said.append)
        matrices.quantize(())
    finally:
        spoilt.weight.copy_(before)
    worst = max(found, key=lambda matrix: matrix.alone)
    assert worst.name == "1.attn.out" == candidates(found)[0]
    assert worst.gain > 0.5
    assert worst.others == pytest.approx(whole * (1 - worst.gain))
    assert without(fresh, matrices, [worst.name]) > 0
    assert said[0].startswith("16 matrices, 2 of 2 steps: about ")


Bench = Callable[..., int]
FLAGS = ("--sensitivity=int8", "--count=1", "--size=64x64", "--steps=1", "--output=found")


def test_the_command_writes_table_and_conclusion(bench: Bench, demo_model: Path, capsys):
    assert bench("quality", *FLAGS, "--checkpoint", str(demo_model)) == 0
    result = json.loads(Path("found.json").read_text())
    (found,) = result["formats"]
    assert found["format"] == "int8"
    assert len(found["matrices"]) == 16
    ratios = [row["ratio"] for row in found["matrices"]]
    assert ratios == sorted(ratios, reverse=True)
    assert all(0 < row["alone"] < found["error"] < 0.05 for row in found["matrices"])
    text = Path("found.md").read_text()
    assert text == page(result)
    assert conclusion(found) in text
    assert "These sizes are of no released model" in text
    assert text in capsys.readouterr().out


def test_a_conclusion_is_what_the_server_takes():
    found: dict[str, Any] = {
        "candidates": ["0.attn.out", "3.ff.down"],
        "gain_db": 1.5,
        "kept": ["0.attn.out", "3.ff.down"],
        "matrices": [
            {"name": "0.attn.out", "bytes": 0.01},
            {"name": "3.ff.down", "bytes": 0.02},
            {"name": "1.ff.down", "bytes": 0.02},
        ],
    }
    assert "`--quantization-ignored-layers '0.attn.out' '3.ff.down'`" in conclusion(found)
    assert "3.0% of the bytes" in conclusion(found)
    assert "none stays in 16 bits" in conclusion(found | {"kept": [], "gain_db": 0.5})
    assert "No matrix is a candidate" in conclusion(found | {"candidates": [], "kept": []})
    Quantization("int8", True, tuple(found["kept"])).check(4)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--sensitivity=int4"], "must be of int8, int8_unrotated, fp8, fp8_rotated, got 'int4'"),
        (["ours", "--sensitivity"], "'ours': --sensitivity takes no configurations"),
        (["--sensitivity", "--clip=x"], "--clip: has no effect with --sensitivity"),
        (["--budget-s=5"], "--budget-s: has no effect without --sensitivity"),
        (["--sensitivity", "--budget-s=0"], "must be a whole number and at least 1"),
        (["--sensitivity", "--checkpoint=missing"], "missing"),
    ],
)
def test_what_cannot_be_measured_is_one_line(bench: Bench, capsys, flags: list[str], error: str):
    assert bench("quality", *flags) == 2
    assert error in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(Path().iterdir())


def test_weights_in_8_bits_are_refused(bench: Bench, demo_model: Path, tmp_path: Path, capsys):
    """What they have lost is not there to be measured."""
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    convert_to_folder(checkpoint, tmp_path / "krea-2-fp8", Quantization("fp8"))
    assert bench("quality", *FLAGS, "--checkpoint", str(tmp_path / "krea-2-fp8")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--checkpoint: transformer_blocks.0." in line
    assert "is stored as fp8" in line
    assert not Path("found.json").exists()


def test_the_committed_page_is_that_of_the_committed_figures():
    stored = json.loads((RESULTS / "sensitivity.json").read_text())
    assert page(stored) == (RESULTS / "sensitivity.md").read_text()
    for found in stored["formats"]:
        assert found["kept"] == kept(found["candidates"], found["gain_db"])
