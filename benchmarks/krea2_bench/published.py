"""The figures that pages show, by the names that they have there: file, place, and format.

Places: names with dots between them; ``[key=value]`` chooses from a list, ``[a=1; b=2]`` by more
than one key, ``[-1]`` by number, and ``[*]`` takes the mean of what follows over all of it. Formats
are Python's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from krea2_bench.adapters.table import figures as adapter_figures
from krea2_bench.dialect_tables import no_effect_table, synonyms_table
from krea2_bench.format_table import format_table
from krea2_bench.settings_tables import settings_table
from krea2_srt.engine.config import EngineConfig
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.threads import SPIN_COUNT

FIGURES = {
    # cpu_baseline.json
    "denoise": ("cpu_baseline.json", "figures[quantity=denoise].ratio_median", ".2f"),
    "decode-float32": (
        "cpu_baseline.json",
        "figures[detail=512x512 float32, vs Diffusers].ratio_median",
        ".2f",
    ),
    "decode-bfloat16": (
        "cpu_baseline.json",
        "figures[detail=1024x1024 bfloat16, vs Diffusers].ratio_median",
        ".2f",
    ),
    "memory-sglang": (
        "cpu_baseline.json",
        "figures[detail=SGLang worker, vs SGLang].ratio_median",
        ".2f",
    ),
    "memory-diffusers": (
        "cpu_baseline.json",
        "figures[detail=one picture, vs Diffusers].ratio_median",
        ".2f",
    ),
    "start": ("cpu_baseline.json", "figures[quantity=start to picture].ratio_median", ".2f"),
    "cached-prompt": ("cpu_baseline.json", "figures[quantity=cached prompt].ours[*]", ".3f"),
    # cpu.*.json
    "psnr-256": ("cpu.uniform-256.json", "pictures.ours.psnr_min", ".0f"),
    "psnr-512": ("cpu.uniform-512.json", "pictures.ours.psnr_min", ".0f"),
    "psnr-mixed": ("cpu.mixed.json", "pictures.ours.psnr_min", ".0f"),
    # simulate.json
    "late-ours": ("simulate.json", "table.srpt, added-wait[*].misses", ".1%"),
    "late-sglang": ("simulate.json", "table.baseline, round-robin[*].misses", ".0%"),
    "late-router": ("simulate.json", "table.baseline, least-work[*].misses", ".0%"),
    "load-ours": ("simulate.json", "capacity.srpt, added-wait[*]", ".2f"),
    "load-sglang": ("simulate.json", "capacity.baseline, round-robin[*]", ".2f"),
    "load-router": ("simulate.json", "capacity.baseline, least-work[*]", ".2f"),
    # http_overhead.json
    "http-alone": (
        "http_overhead.json",
        "figures[name=1 MB base64 image, one at a time, p50 (ms)].value",
        ".1f",
    ),
    "http-many": (
        "http_overhead.json",
        "figures[name=the same over 16 connections (requests/s)].value",
        ".0f",
    ),
    "http-crowd": (
        "http_overhead.json",
        "figures[name=memory with 1000 waiting streams (MB)].value",
        ".0f",
    ),
    "http-event": (
        "http_overhead.json",
        "figures[name=first event after the engine's preview, p50 (ms)].value",
        ".1f",
    ),
    "http-real": (
        "http_overhead.json",
        "figures[name=HTTP above the real engine, 128x128, p50 (ms)].value",
        ".1f",
    ),
    # quantization.json
    "fp8": (
        "quantization.json",
        "products[matrix=6144 wide; tokens=Gaussian; format=fp8].error",
        ".1%",
    ),
    "fp8-tails": (
        "quantization.json",
        "products[matrix=6144 wide; tokens=heavy tails; format=fp8].error",
        ".1%",
    ),
    "fp8-tails-wide": (
        "quantization.json",
        "products[matrix=16384 wide; tokens=heavy tails; format=fp8].error",
        ".1%",
    ),
    "int8-unrotated": (
        "quantization.json",
        "products[matrix=6144 wide; tokens=Gaussian; format=int8_unrotated].error",
        ".1%",
    ),
    "int8-unrotated-tails": (
        "quantization.json",
        "products[matrix=6144 wide; tokens=heavy tails; format=int8_unrotated].error",
        ".1%",
    ),
    "int8-unrotated-tails-wide": (
        "quantization.json",
        "products[matrix=16384 wide; tokens=heavy tails; format=int8_unrotated].error",
        ".1%",
    ),
    "int8-tails": (
        "quantization.json",
        "products[matrix=6144 wide; tokens=heavy tails; format=int8].error",
        ".1%",
    ),
    "int8-tails-wide": (
        "quantization.json",
        "products[matrix=16384 wide; tokens=heavy tails; format=int8].error",
        ".1%",
    ),
    # fidelity.json
    "fidelity-int8": ("fidelity.json", "formats.int8.psnr.mean", ".1f"),
    "fidelity-fp8": ("fidelity.json", "formats.fp8.psnr.mean", ".1f"),
    "fidelity-int8-shape": ("fidelity.json", "formats.int8.judge.shape", ".1%"),
    "fidelity-bf16-shape": ("fidelity.json", "formats.bf16.judge.shape", ".1%"),
    # sensitivity.json
    "sensitivity-int8": ("sensitivity.json", "formats[format=int8].error", ".2%"),
    "sensitivity-fp8": ("sensitivity.json", "formats[format=fp8].error", ".2%"),
    "sensitivity-int8-gain": ("sensitivity.json", "formats[format=int8].gain_db", ".1f"),
    "sensitivity-fp8-gain": ("sensitivity.json", "formats[format=fp8].gain_db", ".1f"),
    # quantization.json
    "fp8-attention": (
        "quantization.json",
        "attention[tokens=Gaussian; format=fa3_fp8].error",
        ".1%",
    ),
    "bf16-attention": (
        "quantization.json",
        "attention[tokens=Gaussian; format=bf16].error",
        ".1%",
    ),
    "int8-step": ("quantization.json", "steps.sizes[size=512x512].ratio", ".2f"),
    # threads.json
    "threads-beside-default": ("threads.json", "settings[name=default].slowest[*]", ".1f"),
    "threads-beside-ours": ("threads.json", f"settings[name={SPIN_COUNT}].slowest[*]", ".1f"),
    "threads-throughput": ("threads.json", f"settings[name={SPIN_COUNT}].throughput", ".2f"),
}

MIXES = {
    "cpu.uniform-256.json": "256x256",
    "cpu.uniform-512.json": "512x512",
    "cpu.mixed.json": "256x256, 512x512, 1024x1024",
}


IN_SHORT = {
    ("cpu.uniform-256.json", 2),
    ("cpu.uniform-512.json", 2),
    ("cpu.mixed.json", 0.9),
    ("cpu.mixed.json", 2),
}
"""The rows of the README's table: file and load."""


def _cpu(results: Callable[[str], Any], short: bool = False) -> str:
    """Ours against SGLang, a row for each mix and load."""
    lines = [
        "| sizes | load | a request takes, times as long | p95, s | in time | images/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file, sizes in MIXES.items():
        for point in results(file)["points"]:
            if short and (file, point["load"]) not in IN_SHORT:
                continue
            (figure,) = (
                f for f in point["figures"]["ours"] if f["figure"] == "latency of a request"
            )
            found = figure["interval"]
            ours, theirs = point["sides"]["ours"], point["sides"]["sglang"]
            cells = [
                sizes,
                f"{point['load']:g}",
                f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})",
                f"{ours['latency_s']['all']['p95']:.2f}, {theirs['latency_s']['all']['p95']:.2f}",
                f"{ours['slo_attainment']:.0%}, {theirs['slo_attainment']:.0%}",
                f"{ours['images_per_s']:.2f}, {theirs['images_per_s']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plans() -> str:
    """Imported here: it needs all that loads a model, and one page alone needs it."""
    from krea2_bench.plan_table import plan_table

    return plan_table()


TABLES: dict[str, Callable[[Callable[[str], Any]], str]] = {
    "cpu": _cpu,
    "cpu-short": partial(_cpu, short=True),
    "engine-settings": lambda _: settings_table(EngineConfig),
    "runner-settings": lambda _: settings_table(RunnerConfig),
    "synonyms": lambda _: synonyms_table(),
    "no-effect": lambda _: no_effect_table(),
    "formats": lambda _: format_table(),
    "plans": lambda _: _plans(),
    "adapters": lambda results: adapter_figures(results("adapters.json")),
}
"""Tables, given what reads a file of results; settings and words of clients are in none."""
