"""The table of 8-bit errors: it is written, and the committed one says what it was made of."""

import json
from pathlib import Path
from statistics import median

import pytest

from krea2_bench import quantization, quantized_steps
from krea2_bench.gpu.models import TINY

RESULTS = Path(quantization.__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def written(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "PRODUCTS", {"256 wide": 256})
        patch.setattr(quantization, "ATTENTION_TOKENS", 96)
        patch.setattr(quantization, "SIDE", 64)
        patch.setattr(quantization, "STEPS", 2)
        patch.setattr(quantized_steps, "CONFIG", TINY.dit)
        patch.setattr(quantized_steps, "SIDES", (32, 48))
        patch.setattr(quantized_steps, "MOST_ROUNDS", 3)
        arguments = ["--model", str(demo_model), "--output", str(folder)]
        assert quantization.main(arguments) == 0
    return json.loads((folder / "quantization.json").read_text()), folder / "quantization.md"


@pytest.mark.slow
def test_all_formats_are_compared_on_all_distributions(written):
    found, page = written
    assert len(found["products"]) == 3 * 4
    assert len(found["pictures"]) == 4 + 2
    assert all(0 < row["error"] < 0.2 for row in found["products"])
    assert all(row["psnr"] > 25 and len(row["step_errors"]) == 2 for row in found["pictures"])
    assert "not measured" in page.read_text()


@pytest.mark.slow
def test_attention_in_fp8_is_compared_with_that_in_bf16(written):
    found, page = written
    errors = {(row["tokens"], row["format"]): row["error"] for row in found["attention"]}
    kinds = dict.fromkeys(row["tokens"] for row in found["products"])
    assert errors.keys() == {(kind, name) for kind in kinds for name in ("bf16", "fa3_fp8")}
    for kind in kinds:
        assert errors[kind, "bf16"] < 0.005 < 0.02 < errors[kind, "fa3_fp8"] < 0.2
        assert f"| {kind} | {errors[kind, 'bf16']:.2%} | {errors[kind, 'fa3_fp8']:.2%} |" in (
            page.read_text()
        )


@pytest.mark.slow
def test_steps_in_int8_are_compared_round_by_round(written):
    found, page = written
    steps = found["steps"]
    assert [size["size"] for size in steps["sizes"]] == ["32x32", "48x48"]
    for size in steps["sizes"]:
        assert size["ms"].keys() == {"bf16", "int8"}
        ratios = [b / a for a, b in zip(*size["ms"].values(), strict=True)]
        assert len(ratios) == 3
        assert size["ratio"] == median(ratios)
        assert size["low"] <= size["ratio"] <= size["high"]
        assert f"| {size['size']} | {size['tokens']} |" in page.read_text()


def test_the_middle_half_leaves_a_quarter_at_each_end():
    assert quantized_steps.quartiles([5.0, 1.0, 2.0, 9.0, 3.0]) == (2.0, 5.0)
    assert quantized_steps.quartiles([2.0]) == (2.0, 2.0)


def test_the_committed_page_is_that_of_the_committed_figures():
    stored = json.loads((RESULTS / "quantization.json").read_text())
    page = quantization.page(
        stored["products"], stored["pictures"], stored["attention"], stored["steps"]
    )
    assert page == (RESULTS / "quantization.md").read_text()
