"""How long a step takes in 8 bits on a CPU, against bf16: blocks of the released widths.

fp8 is not among them: a CPU multiplies e4m3 as float32, which says nothing of any machine that
somebody would run it on.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from krea2_bench.gpu.models import quantized_copy, random_dit
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.steps import step
from krea2_bench.provenance import provenance, typed
from krea2_srt.model.checkpoint import SamplingDefaults
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import SERVED
from krea2_srt.runner.attention import AttentionChoice
from krea2_srt.runner.attention_backends import SDPA
from krea2_srt.runner.model_runner import Krea2Runner

CONFIG = replace(
    Krea2Config(),
    num_layers=2,
    # No step reads the text's own blocks.
    text_hidden_dim=64,
    text_num_attention_heads=1,
    text_num_key_value_heads=1,
    text_intermediate_size=128,
)

SIDES = (256, 512, 768)
"""Pixels a side of the pictures."""

SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 40.0, 5, 25
"""For each side. A round is a step in each format."""

LIMIT, LIMIT_TOKENS = 1.1, 1088
"""At most so many times as long as bf16's, from so many tokens on."""

_SECTION = """
## A step on a CPU

{blocks} blocks of the released widths with random weights. Formats take turns, step by step;
*ratio* is the median of the rounds', in brackets with the ends of their middle half. Wanted: at
most {limit} from {tokens} tokens on. fp8 has no place here: a CPU multiplies it as float32.

{rows}
{date} on {cores} cores of {cpu}; load average {load} before, {after} after it: what
is above {cores} was other work.
"""


def step_times() -> dict[str, Any]:
    """Milliseconds of every step, by size and format, and where they were measured."""
    found = provenance(["python", "-m", *typed("krea2_bench.quantization")], ("torch",))
    dit = random_dit(CONFIG, torch.device("cpu"), torch.bfloat16)
    runners = {"bf16": _runner(dit), "int8": _runner(quantized_copy(dit, SERVED["int8"]))}
    sizes = list(_sizes(runners))
    after = round(os.getloadavg()[0], 2)
    return found | {"load_after": after, "blocks": CONFIG.num_layers, "sizes": sizes}


def _runner(dit: Krea2DiT) -> Krea2Runner:
    parts: Any = None
    return Krea2Runner(dit, parts, parts, SamplingDefaults(True), AttentionChoice(SDPA, None))


def _sizes(runners: dict[str, Krea2Runner]) -> Iterator[dict[str, Any]]:
    for side in SIDES:
        states = {name: images(runner, ((side, side),)) for name, runner in runners.items()}
        for name, runner in runners.items():  # to warm up
            step(runner, states[name])
        order = list(runners)
        ms: dict[str, list[float]] = {name: [] for name in order}
        begun = time.monotonic()
        for number in range(MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() - begun > SECONDS:
                break
            for name in order:
                start = time.perf_counter()
                step(runners[name], states[name])
                ms[name].append((time.perf_counter() - start) * 1e3)
            order.reverse()
        ratios = [int8 / bf16 for bf16, int8 in zip(ms["bf16"], ms["int8"], strict=True)]
        low, high = quartiles(ratios)
        (state,) = states["bf16"]
        size = {"size": name_of(side), "tokens": state.num_tokens, "ms": ms}
        print(f"{name_of(side)}: {median(ratios):.2f}", file=sys.stderr, flush=True)
        yield size | {"ratio": median(ratios), "low": low, "high": high}


def quartiles(values: list[float]) -> tuple[float, float]:
    """The ends of the middle half."""
    ordered, away = sorted(values), len(values) // 4
    return ordered[away], ordered[-1 - away]


def section(found: dict[str, Any]) -> str:
    """What the page says of it."""
    lines = [
        "| picture | tokens | bf16 | int8 | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in found["sizes"]:
        bf16, int8 = (f"{median(size['ms'][name]):.0f} ms" for name in ("bf16", "int8"))
        ratio = f"{size['ratio']:.2f} ({size['low']:.2f} to {size['high']:.2f})"
        lines.append(f"| {size['size']} | {size['tokens']} | {bf16} | {int8} | {ratio} |")
    return _SECTION.format(
        blocks=found["blocks"],
        cores=found["cpu_count"],
        limit=LIMIT,
        tokens=LIMIT_TOKENS,
        rows="\n".join(lines) + "\n",
        date=found["date"][:10],
        cpu=found["cpu"],
        load=found["load_average"],
        after=found["load_after"],
    )
