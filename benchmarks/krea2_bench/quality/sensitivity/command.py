"""krea2-bench quality --sensitivity: measure, apply the rule, and write the tables."""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from krea2_bench.eight_bits import FORMATS
from krea2_bench.provenance import provenance, typed
from krea2_bench.quality.cases import CaseError, cases_of
from krea2_bench.quality.sensitivity.measure import Matrices, VelocityErrors, measure, without
from krea2_bench.quality.sensitivity.page import page
from krea2_bench.quality.sensitivity.rule import candidates, kept
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import open_dit
from krea2_srt.model.hub import find_checkpoint
from krea2_srt.offline import device_of
from krea2_srt.runner.model_runner import Krea2Runner

COUNT = 4
"""Prompts of our own, unless told otherwise."""

_WHOLE = ("BF16", "F16", "F32")
"""As safetensors and GGUF call what is not quantised."""

_RELEASED_SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "intermediate_size")


def write_sensitivity(args: argparse.Namespace, budget_s: int) -> int:
    """Measure, write ``PREFIX.json`` and ``PREFIX.md``, and print the page.

    Raises:
        CaseError: an option is wrong, or the checkpoint's weights are in 8 bits already.
    """
    start = time.perf_counter()
    formats = args.sensitivity.split(",")
    for format in formats:
        if format not in FORMATS:
            raise CaseError(f"--sensitivity: must be of {', '.join(FORMATS)}, got {format!r}")
    cases = cases_of(args, COUNT)
    checkpoint = find_checkpoint(str(args.checkpoint))
    _check_sixteen_bits(checkpoint.transformer)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runner = Krea2Runner.load(
        checkpoint,
        device_of("auto"),
        torch.float32,
        text_dtype=torch.bfloat16,
        vae_dtype=torch.bfloat16,
    )
    errors = VelocityErrors(runner, cases)
    found = []
    for number, format in enumerate(formats):
        left = budget_s - (time.perf_counter() - start)
        found.append(_measured(format, errors, left / (len(formats) - number)))
    result = {
        "run": provenance(typed("krea2-bench"), ("krea2-srt", "torch")),
        "model": _about(runner.dit.config),
        "prompts": len(cases),
        "size": args.size,
        "guidance": args.guidance,
        "seconds": round(time.perf_counter() - start),
        "formats": found,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.output.with_name(f"{args.output.name}.json").write_text(f"{text}\n", encoding="utf-8")
    args.output.with_name(f"{args.output.name}.md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return 0


def _measured(format: str, errors: VelocityErrors, budget_s: float) -> dict[str, Any]:
    """All of one format, for JSON."""
    matrices = Matrices(errors.runner.dit, FORMATS[format])
    watch = partial(tqdm, desc=format, unit="matrix", disable=None)
    say = partial(print, f"{format}:", file=sys.stderr, flush=True)
    whole, found = measure(errors, matrices, budget_s, say, watch)
    names = candidates(found)
    gain_db = 10 * math.log10(whole / without(errors, matrices, names)) if names else 0.0
    matrices.quantize(())
    return {
        "format": format,
        "steps": list(errors.steps),
        "num_steps": errors.num_steps,
        "error": round(math.sqrt(whole), 6),
        "candidates": names,
        "gain_db": round(gain_db, 3),
        "kept": kept(names, gain_db),
        "matrices": [
            {
                "name": matrix.name,
                "bytes": round(matrix.size, 5),
                "alone": round(math.sqrt(matrix.alone), 6),
                "others": round(math.sqrt(matrix.others), 6),
                "gain": round(matrix.gain, 4),
                "ratio": round(matrix.ratio, 3),
            }
            for matrix in sorted(found, key=lambda matrix: -matrix.ratio)
        ],
    }


def _check_sixteen_bits(transformer: Path) -> None:
    """Refuse a checkpoint whose matrices have lost already what is to be measured."""
    with open_dit(transformer) as opened:
        for tensor in opened.tensors.values():
            if tensor.kind not in _WHOLE:
                raise CaseError(
                    f"--checkpoint: {tensor.key} is stored as {tensor.kind}; --sensitivity needs "
                    f"the weights that the model was released with, in 16 or 32 bits"
                )


def _about(config: Krea2Config) -> dict[str, Any]:
    released = Krea2Config()
    return {
        "blocks": config.num_layers,
        "width": config.num_attention_heads * config.attention_head_dim,
        "released_sizes": all(
            getattr(config, name) == getattr(released, name) for name in _RELEASED_SIZES
        ),
    }
