"""krea2-bench quality: PSNR, SSIM and CLIPScore of two configurations, and a contact sheet."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from krea2_bench.arguments import count
from krea2_bench.load.mix import parse_mix
from krea2_bench.load.prompts import bundled_prompts
from krea2_bench.provenance import provenance, typed
from krea2_bench.quality.generators import (
    SYNTAX,
    Case,
    GeneratorError,
    ImageGenerator,
    parse_generator,
)
from krea2_bench.quality.metrics import ClipScorer, psnr, ssim
from krea2_srt.threads import limit_spinning

_PACKAGES = ("krea2-srt", "torch", "diffusers", "scikit-image", "transformers")


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "quality",
        help="compare pictures",
        allow_abbrev=False,
        description=__doc__,
        epilog=f"A configuration is {SYNTAX}.",
    )
    add = parser.add_argument
    add("first", help="configuration, for example ours:quantization=fp8")
    add("second", help="what it is compared to, for example ours or diffusers")
    add("--checkpoint", type=Path, default=Path("demo-model/krea-2-demo"), metavar="DIR")
    add("--prompts", type=Path, metavar="FILE", help="one a line; by default some of our own")
    add("--count", type=count, default=12, help="of our own prompts (default 12)")
    add("--size", default="512x512", help="of the pictures (default 512x512)")
    add("--steps", type=count, default=8, help="denoising steps (default 8)")
    add("--guidance", type=float, default=0.0, help="Krea's scale; 0 is off (default)")
    add("--seed", type=int, default=0, help="of the first picture; then one more each (default 0)")
    add("--clip", metavar="MODEL", help="folder or repo id of a CLIP model, for CLIPScore")
    add(
        "--output",
        type=Path,
        default=Path("krea2-bench-quality"),
        metavar="PREFIX",
        help="results go to PREFIX.json and PREFIX.png (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    limit_spinning()
    cases = _cases(args)
    generators = [parse_generator(text, args.checkpoint) for text in (args.first, args.second)]
    clip = ClipScorer(args.clip) if args.clip else None
    first, second = (
        _generated(generator, cases, name)
        for generator, name in zip(generators, (args.first, args.second), strict=True)
    )
    prompts = [case.prompt for case in cases]
    rows = [
        {"prompt": prompt, "psnr": psnr(a, b), "ssim": ssim(a, b)}
        for prompt, a, b in zip(prompts, first, second, strict=True)
    ]
    if clip is not None:
        for side, pictures in (("first", first), ("second", second)):
            for row, score in zip(rows, clip.scores(pictures, prompts), strict=True):
                row[f"clip_{side}"] = score
    result = {
        "run": provenance(typed("krea2-bench"), _PACKAGES),
        "first": args.first,
        "second": args.second,
        "summary": summarise(rows),
        "pictures": [_finite(row) for row in rows],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.output.with_name(f"{args.output.name}.json").write_text(f"{text}\n", encoding="utf-8")
    from krea2_bench.quality.sheet import contact_sheet

    captions = [_caption(row) for row in rows]
    sheet = contact_sheet(
        (args.first, args.second), list(zip(first, second, strict=True)), captions
    )
    sheet.save(args.output.with_name(f"{args.output.name}.png"))
    print(_text(args, result["summary"]))
    return 0


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least, median and greatest of each metric; equal pictures have no PSNR, and are counted."""
    found: dict[str, Any] = {"pictures": len(rows)}
    found["equal"] = sum(math.isinf(row["psnr"]) for row in rows)
    for name in [name for name in rows[0] if name != "prompt"]:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        found[name] = None
        if values:
            spread = {"min": min(values), "median": median(values), "max": max(values)}
            found[name] = {key: round(value, 4) for key, value in spread.items()}
    return found


def _cases(args: argparse.Namespace) -> list[Case]:
    (kind,) = parse_mix(args.size)
    if kind.width % 16 or kind.height % 16:
        raise GeneratorError(f"--size: must be of multiples of 16, got {args.size}")
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        # Evenly over their lengths, and so over languages.
        every = bundled_prompts()
        places = np.linspace(0, len(every) - 1, min(args.count, len(every))).round().astype(int)
        prompts = [every[place].text for place in places]
    if not prompts:
        raise GeneratorError(f"--prompts: {args.prompts} holds no prompt")
    return [
        Case(prompt, args.seed + number, kind.width, kind.height, args.steps, args.guidance)
        for number, prompt in enumerate(prompts)
    ]


def _generated(generator: ImageGenerator, cases: Sequence[Case], name: str) -> list[np.ndarray]:
    generating = tqdm(generator.generate(cases), name, len(cases), unit="picture", disable=None)
    return list(generating)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinity: the PSNR of equal pictures is null."""
    return {
        name: None if value == math.inf else round(value, 4) if isinstance(value, float) else value
        for name, value in row.items()
    }


def _caption(row: dict[str, Any]) -> str:
    ratio = "equal" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f} dB"
    clip = ""
    if "clip_first" in row:
        clip = f", CLIPScore {row['clip_first']:.1f} / {row['clip_second']:.1f}"
    return f"{ratio}, SSIM {row['ssim']:.4f}{clip}: {row['prompt']}"


def _text(args: argparse.Namespace, summary: dict[str, Any]) -> str:
    lines = [f"{args.first} against {args.second}: {summary['pictures']} pictures"]
    lines.append(f"  equal to the byte: {summary['equal']}")
    for name, label in (
        ("psnr", "PSNR of the others, dB"),
        ("ssim", "SSIM"),
        ("clip_first", f"CLIPScore of {args.first}"),
        ("clip_second", f"CLIPScore of {args.second}"),
    ):
        if found := summary.get(name):
            lines.append(
                f"  {label}: {found['median']:.4g} ({found['min']:.4g} to {found['max']:.4g})"
            )
    lines.append(f"  {args.output}.json, {args.output}.png")
    return "\n".join(lines)
