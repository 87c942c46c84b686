"""What memory is taken, beside what `krea2_srt.runner.memory_plan` reckons with."""

from collections.abc import Callable

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.rows import Row
from krea2_bench.gpu.sequences import images
from krea2_bench.gpu.steps import step
from krea2_bench.gpu.timing import wait
from krea2_bench.gpu.vae import decoded, latents_of
from krea2_srt.model.vae import default_tile, scores_per_slice
from krea2_srt.runner.memory_sizes import GRAPH_BYTES
from krea2_srt.runner.part_sizes import num_bytes, part_sizes

GIB, MIB = 2**30, 2**20


def run(context: Context) -> None:
    """Weights; on a GPU the fullest moments of a step, a decode and an encoding, and graphs."""
    runner, add = context.whole(context.runner), context.findings.add
    sizes = part_sizes(
        runner.dit,
        runner.text_encoder.model,
        runner.vae,
        default_tile(context.device),
        scores_per_slice(context.device),
    )
    parts = {
        "transformer, bf16": runner.dit,
        "transformer, fp8": context.quantized_runner("fp8").dit,
        "text encoder": runner.text_encoder.model,
        "VAE decoder": runner.vae,
    }
    for name, module in parts.items():
        add(Row("memory", name, num_bytes([module]) / GIB, "GiB"))
    graphs, runner.graphs = runner.graphs, None
    side, count = (64, 5) if context.smoke else (2048, 500)
    (sequence,) = images(runner, ((side, side),))
    latents = latents_of(context, side, side)
    words = " ".join(["word"] * count)
    prompts = [f"{number} {words}" for number in range(8)]
    text_graphs, runner.prompt_encoder.graphs = runner.prompt_encoder.graphs, None
    a_step, a_decode = sequence.num_tokens * sizes.step_per_token, sizes.decoder.of(side * side)
    for name, work, planned in (
        ("step of 2048x2048", lambda: step(runner, [sequence]), a_step),
        ("decode of 2048x2048", lambda: decoded(runner.vae, latents), a_decode),
        ("8 long prompts", lambda: runner.prompt_encoder.encode(prompts), sizes.encodes[-1]),
    ):
        note = f"planned {planned / GIB:.2f}"
        if context.on_gpu:
            add(Row("memory", name, _peak(work, context.device) / GIB, "GiB", note=note))
        else:
            work()
    runner.graphs, runner.prompt_encoder.graphs = graphs, text_graphs
    if not context.use_graphs(runner) or not context.on_gpu:
        return
    # Of sizes that were not captured yet, in a pool that is as large as it gets: only what graphs
    # take themselves.
    assert runner.graphs is not None
    runner.graphs.prime()
    free, _ = torch.cuda.mem_get_info(context.device)
    before = len(runner.graphs)
    for text in range(100, 500, 40):
        runner.prepare(images(runner, ((320, 320),), text))
    taken = free - torch.cuda.mem_get_info(context.device)[0]
    if captured := len(runner.graphs) - before:
        note = f"planned {GRAPH_BYTES / MIB:.0f}; of {captured}"
        add(Row("memory", "one graph", taken / captured / MIB, "MiB", note=note))


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the fullest moment of some work, beyond those before it."""
    work()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
