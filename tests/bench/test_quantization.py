"""The table of 8-bit errors: it is written, and the committed one says what it was made of."""

import json
from pathlib import Path

import pytest

from krea2_bench import quantization

RESULTS = Path(quantization.__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def written(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "PRODUCTS", {"256 wide": 256})
        patch.setattr(quantization, "ATTENTION_TOKENS", 96)
        patch.setattr(quantization, "SIDE", 64)
        patch.setattr(quantization, "STEPS", 2)
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


def test_the_committed_page_is_that_of_the_committed_figures():
    stored = json.loads((RESULTS / "quantization.json").read_text())
    page = quantization.page(stored["products"], stored["pictures"], stored.get("attention", ()))
    assert page == (RESULTS / "quantization.md").read_text()
