"""How near the trained demo's pictures in 8 bits are to those in bf16, and to their prompts.

``python -m tools.demo_model.fidelity --model demo-model/krea-2-demo`` writes the table in
benchmarks/results/; three to four minutes on two quiet cores.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import numpy as np
from tqdm import tqdm

from krea2_bench.compare.pictures import psnr
from krea2_bench.provenance import provenance, typed
from krea2_srt.model.quantization import SERVED
from krea2_srt.offline import Krea2
from krea2_srt.request import ImageRequest
from tools.demo_model.evaluate import Score
from tools.demo_model.judge import judge
from tools.demo_model.reading import draw_captions
from tools.demo_model.wish import Wish

STEPS, PACK = 8, 16
SIZES = ((128, 128), (192, 128), (128, 192), (192, 192), (256, 256))
"""Smallest first."""

LEAST_GAIN_DB = 4.0
"""What int8 has to be nearer to bf16 than fp8 is."""

MOST_POINTS = 0.01
"""How far int8 may be from bf16 by the judge, as a part of the pictures."""


@dataclass(frozen=True)
class Asked:
    """A prompt that training has never seen the like of, and the size of its picture."""

    wish: Wish
    prompt: str
    width: int
    height: int


def asked(count: int, sizes: Sequence[tuple[int, int]]) -> list[Asked]:
    """Prompts, each at the first of the sizes that has room for what it asks for."""
    found = []
    # Few ask for more than the largest size has room for.
    for wish, prompt in draw_captions(2 * count, Random(2026), held_out=True):
        room = next((size for size in sizes if wish.fits(*size)), None)
        if room is not None:
            found.append(Asked(wish, prompt, *room))
    return found[:count]


def measure(model: Path, prompts: Sequence[Asked]) -> dict[str, Any]:
    """Generate everything in bf16 and in each format, with the same seeds.

    Returns:
        For JSON: of each format the judge's counts, and of those in 8 bits the PSNR to bf16 as
        mean, median and least of the pictures that differ, and of all errors together.
    """
    expected = _generated(model, None, prompts)
    found: dict[str, Any] = {"bf16": {"judge": _score(expected, prompts)}}
    for name in SERVED:
        pictures = _generated(model, name, prompts)
        ratios = [psnr(a, b) for a, b in zip(pictures, expected, strict=True)]
        different = [ratio for ratio in ratios if math.isfinite(ratio)]
        error = fmean(10 ** (-ratio / 10) for ratio in ratios)
        values = {
            "mean": fmean(different),
            "median": median(different),
            "least": min(different),
            "together": -10 * math.log10(error),
        }
        found[name] = {
            "judge": _score(pictures, prompts),
            "equal": len(ratios) - len(different),
            "psnr": {key: round(value, 2) for key, value in values.items()},
        }
    return found


def _generated(model: Path, format: str | None, prompts: Sequence[Asked]) -> list[np.ndarray]:
    loaded = Krea2.load(model, device="cpu", quantization=SERVED[format] if format else None)
    requests = [
        ImageRequest(it.prompt, it.width, it.height, STEPS, seed=seed)
        for seed, it in enumerate(prompts)
    ]
    generating = loaded.images(requests, pack=PACK)
    return list(tqdm(generating, format or "bf16", len(prompts), unit="picture", disable=None))


def _score(pictures: Sequence[np.ndarray], prompts: Sequence[Asked]) -> dict[str, float]:
    verdicts = [judge(pixels, it.wish) for pixels, it in zip(pictures, prompts, strict=True)]
    return {name: round(part, 4) for name, part in vars(Score.of(verdicts)).items()}


def shortfalls(formats: dict[str, Any]) -> list[str]:
    """What of int8 is not as it has to be; empty if all is.

    Args:
        formats: what `measure` has found.
    """
    int8, fp8, bf16 = formats["int8"], formats["fp8"], formats["bf16"]
    found = [
        f"PSNR, {name}: {value} dB, fp8 has {fp8['psnr'][name]}"
        for name, value in int8["psnr"].items()
        if name != "least" and value < fp8["psnr"][name] + LEAST_GAIN_DB
    ]
    found += [
        f"{name}: {value:.1%} by the judge, bf16 has {bf16['judge'][name]:.1%}"
        for name, value in int8["judge"].items()
        if abs(value - bf16["judge"][name]) > MOST_POINTS + 1e-9
    ]
    return found


_PAGE = """\
# 8 bits on the trained demo

`{command}`, {date}, {cpus} cores of {cpu}.

{count} prompts that training has never seen the like of, {side}x{side}, {steps} steps, the same
seeds in every format, on a CPU. The judge looks at pixels: is the asked colour there, as often as
asked, the asked shape, and the background. The model has 4 blocks of width 256: this says nothing
of how near the released model's pictures are, which is not measured.

{rows}
*together*: the PSNR of the squared errors of all pictures. int8 is with a rotation in blocks of 256
(ConvRot's), fp8 without. To hold (`tests/bench/test_fidelity.py`): int8 at least {gain:g} dB above
fp8, and within {points:.0%} of bf16 by the judge.
"""


def page(result: dict[str, Any]) -> str:
    """The table, in Markdown.

    Args:
        result: what `main` writes as JSON.
    """
    lines = [
        "| | PSNR to bf16, mean | median | least | together | colour | shape | background |",
        "|" + " --- |" * 8,
    ]
    for name, its in result["formats"].items():
        ratios = its.get("psnr", {})
        cells = [f"{ratios[key]:.1f} dB" if ratios else "" for key in _RATIOS]
        cells += [f"{its['judge'][key]:.1%}" for key in ("colour", "shape", "background")]
        lines.append(f"| {' | '.join((name, *cells))} |")
    run = result["run"]
    return _PAGE.format(
        command=run["command"],
        date=run["date"][:10],
        cpus=run["cpu_count"],
        cpu=run["cpu"],
        count=result["prompts"],
        side=result["side"],
        steps=STEPS,
        rows="\n".join(lines) + "\n",
        gain=LEAST_GAIN_DB,
        points=MOST_POINTS,
    )


_RATIOS = ("mean", "median", "least", "together")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.fidelity",
        allow_abbrev=False,
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained demo")
    parser.add_argument("--count", type=int, default=200, help="of prompts (default 200)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    args = parser.parse_args(argv)
    side = 256
    prompts = asked(args.count, [(side, side)])
    result: dict[str, Any] = {
        "run": provenance(
            ["python", "-m", *typed("tools.demo_model.fidelity")], ("krea2-srt", "torch")
        ),
        "prompts": len(prompts),
        "side": side,
        "formats": measure(args.model, prompts),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "fidelity.md").write_text(page(result))
    print(page(result))
    for shortfall in shortfalls(result["formats"]):
        print(f"int8 is not as it has to be: {shortfall}")


if __name__ == "__main__":
    main()
