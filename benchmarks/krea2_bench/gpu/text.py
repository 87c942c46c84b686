"""Encoding prompts; and whether a captured encoder leaves it possible to capture a step."""

import time
from typing import Any

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.graphs import why_eager
from krea2_bench.gpu.rows import FAILED, LEFT_OUT, Missing, Row, timed
from krea2_bench.gpu.sequences import images
from krea2_bench.gpu.timing import timings, wait
from krea2_srt.runner.part_sizes import num_bytes

WORDS = (10, 100, 450)


def run(context: Context) -> None:
    """One new prompt, by its length, eagerly and on a graph; then a step is captured, in the same
    process as the encoder was.
    """
    runner = context.whole(context.runner)
    encoder = runner.text_encoder
    copy = context.findings.get("ceilings", "copy")
    weights = num_bytes([encoder.model]) - num_bytes([encoder.model.embed_tokens])
    floor = weights / copy / 1e6 if copy else None
    runner.use_text_graphs(context.text_capture)
    prompts, graphs = runner.prompt_encoder, runner.prompt_encoder.graphs
    for words in (5,) if context.smoke else WORDS:
        prompt = " ".join(["word"] * words)

        def encode(on_graphs: bool, prompt: str = prompt) -> None:
            prompts.graphs = graphs if on_graphs else None
            runner.contexts.clear()
            runner.encode([prompt])

        name = f"{words} words"
        with context.findings.attempt("text", name):
            works = {f"{name} eager": (lambda e=encode: e(False), "eager")}
            if reason := _not_captured(graphs, encode):
                missing = Missing("text", f"{name} graph", LEFT_OUT, f"ran eagerly: {reason}")
                context.findings.miss(missing)
            else:
                works[f"{name} graph"] = (lambda e=encode: e(True), "graph")
            calls = [work for work, _ in works.values()]
            found = timings(calls, context.device, context.seconds / 2)
            for (what, (_, how)), timing in zip(works.items(), found, strict=True):
                context.findings.add(timed("text", what, timing, floor, how=how))
    prompts.graphs = graphs
    _capture_a_step(context)


def _not_captured(graphs: Any, encode: Any) -> str:
    """Let a prompt come as often as it must to be captured; empty, or why it is not."""
    before = len(graphs)
    for _ in range(3):
        encode(True)
    if len(graphs) > before:
        return ""
    return next(reversed(graphs.failures.values()), "it is too large for any graph")


def _capture_a_step(context: Context) -> None:
    side = 32 if context.smoke else 512
    what = "a step captured after the text encoder"
    with context.findings.attempt("text", what):
        context.use_graphs(context.runner)
        sequences = images(context.runner, ((side, side),))
        start = time.perf_counter()
        reason = why_eager(context.runner, sequences)
        wait(context.device)
        if reason:
            context.findings.miss(Missing("text", what, FAILED, reason))
            return
        context.findings.add(
            Row("text", what, (time.perf_counter() - start) * 1e3, "ms", how="graph")
        )
