"""Pictures of several configurations side by side: PSNR, SSIM, CLIPScore and a contact sheet."""

import argparse
import json
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from krea2_bench.provenance import provenance, typed
from krea2_bench.quality.cases import Case, cases_of
from krea2_bench.quality.generators import ImageGenerator, parse_generator
from krea2_bench.quality.metrics import ClipScorer, psnr, ssim

DEFAULT = ("ours:quantization=int8", "ours:quantization=fp8", "ours")
"""The 8-bit formats, against bf16."""

COUNT = 12
"""Prompts of our own, unless told otherwise."""

PACKAGES = ("krea2-srt", "torch", "diffusers", "scikit-image", "transformers")

Row = dict[str, Any]
"""Metrics of one picture by name; equal pictures have an infinite PSNR."""


def compare(args: argparse.Namespace) -> int:
    """Generate, write ``PREFIX.json`` and ``PREFIX.png``, and print the table."""
    names = tuple(args.configurations) or DEFAULT
    cases = cases_of(args, COUNT)
    generators = [parse_generator(name, args.checkpoint) for name in names]
    clip = ClipScorer(args.clip) if args.clip else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    *sides, baseline = (
        _generated(generator, cases, name)
        for generator, name in zip(generators, names, strict=True)
    )
    prompts = [case.prompt for case in cases]
    rows: list[list[Row]] = [
        [{"psnr": psnr(a, b), "ssim": ssim(a, b)} for a, b in zip(side, baseline, strict=True)]
        for side in sides
    ]
    scores: list[Row] = [{} for _ in cases]
    if clip is not None:
        for pictures, its in zip((*sides, baseline), (*rows, scores), strict=True):
            for row, score in zip(its, clip.scores(pictures, prompts), strict=True):
                row["clip"] = score
    summaries = [summarise(its) for its in rows]
    result = {
        "run": provenance(typed("krea2-bench"), PACKAGES),
        "baseline": {"configuration": names[-1], **_spreads(scores)},
        "compared": [
            {"configuration": name, **summary}
            for name, summary in zip(names, summaries, strict=False)
        ],
        "pictures": [
            {
                "prompt": prompt,
                "baseline": _finite(score),
                "compared": [_finite(its[number]) for its in rows],
            }
            for number, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
        ],
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.output.with_name(f"{args.output.name}.json").write_text(f"{text}\n", encoding="utf-8")
    from krea2_bench.quality.sheet import contact_sheet

    captions = [
        f"{', '.join(_caption(its[number]) for its in rows)}: {prompt}"
        for number, prompt in enumerate(prompts)
    ]
    sheet = contact_sheet(names, list(zip(*sides, baseline, strict=True)), captions)
    sheet.save(args.output.with_name(f"{args.output.name}.png"))
    print(table(result))
    print(f"{args.output}.json, {args.output}.png")
    return 0


def summarise(rows: Sequence[Row]) -> Row:
    """Least, median and greatest of each metric; equal pictures have no PSNR, and are counted."""
    equal = sum(math.isinf(row["psnr"]) for row in rows)
    return {"pictures": len(rows), "equal": equal, **_spreads(rows)}


def table(result: Row) -> str:
    """The configurations side by side, as text: median (least to greatest) of each metric."""
    baseline = result["baseline"]
    lines = [["", "equal", "PSNR, dB", "SSIM", "CLIPScore"]]
    for its in result["compared"]:
        metrics = [_spread(its.get(name)) for name in ("psnr", "ssim", "clip")]
        lines.append([its["configuration"], str(its["equal"]), *metrics])
    lines.append([baseline["configuration"], "", "", "", _spread(baseline.get("clip"))])
    if "clip" not in baseline:
        lines = [line[:-1] for line in lines[:-1]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = f"{len(result['pictures'])} pictures against those of {baseline['configuration']}"
    aligned = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join([head, *aligned])


def _generated(generator: ImageGenerator, cases: Sequence[Case], name: str) -> list[np.ndarray]:
    generating = tqdm(generator.generate(cases), name, len(cases), unit="picture", disable=None)
    return list(generating)


def _spreads(rows: Sequence[Row]) -> Row:
    found: Row = {}
    for name in rows[0]:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        found[name] = None
        if values:
            spread = {"min": min(values), "median": median(values), "max": max(values)}
            found[name] = {key: round(value, 4) for key, value in spread.items()}
    return found


def _finite(row: Row) -> Row:
    """For JSON, which has no infinity: the PSNR of equal pictures is null."""
    return {name: None if value == math.inf else round(value, 4) for name, value in row.items()}


def _caption(row: Row) -> str:
    ratio = "equal" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f} dB"
    clip = f", CLIPScore {row['clip']:.1f}" if "clip" in row else ""
    return f"{ratio}, SSIM {row['ssim']:.4f}{clip}"


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.4g} ({found['min']:.4g} to {found['max']:.4g})"
