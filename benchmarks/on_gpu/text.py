"""Encoding prompts: the text encoder and the text fusion stage."""

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.rows import timed
from benchmarks.on_gpu.steps import use_graphs
from benchmarks.on_gpu.timing import timings
from krea2_srt.runner.part_sizes import num_bytes

WORDS = (10, 100, 450)


def run(context: Context) -> None:
    """One new prompt, by its length; on graphs where there are any."""
    use_graphs(context)
    runner, encoder = context.runner, context.text_encoder
    copy = context.findings.get("ceilings", "copy")
    weights = num_bytes([encoder.model]) - num_bytes([encoder.model.embed_tokens])
    graphs = encoder.graphs
    for words in (5,) if context.smoke else WORDS:
        prompt = " ".join(["word"] * words)

        def encode(on_graphs: bool, prompt: str = prompt) -> None:
            encoder.graphs = graphs if on_graphs else None
            runner.contexts.clear()
            runner.encode([prompt])

        works = {"eager": lambda: encode(False)}
        if graphs is not None:
            works["graph"] = lambda: encode(True)
        found = timings(list(works.values()), context.device, context.seconds)
        floor = weights / copy / 1e6 if copy else None
        for how, timing in zip(works, found, strict=True):
            context.findings.rows.append(timed("text", f"{words} words {how}", timing, floor))
    encoder.graphs = graphs
