"""Does a picture depend on what else is in its pack, or on whether a graph is replayed?"""

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.correctness import WrongResult, check
from krea2_bench.gpu.graphs import captured
from krea2_bench.gpu.sequences import images, relative, stepped
from krea2_srt.runner.graphs import StepGraphs
from krea2_srt.runner.memory_choices import MAX_GRAPH_TOKENS
from krea2_srt.runner.packing import ForwardBatch

SIDES = ((256, 256), (512, 320), (256, 256), (64, 128))


def run(context: Context) -> None:
    """Packed against alone, a replayed graph against the same forward run kernel by kernel."""
    sides = ((32, 32), (64, 32)) if context.smoke else SIDES
    sequences = images(context.runner, sides)
    packed = stepped(context.runner, sequences)
    worst = 0.0
    for sequence, expected in zip(sequences, packed, strict=True):
        (alone,) = stepped(context.runner, [sequence])
        worst = max(worst, relative(alone, expected))
    check(context, "equality", "packed vs alone", worst, 2e-2 if context.on_gpu else 1e-5)
    graph = context.attention.graph
    if graph is None:
        return
    found = []
    batch = ForwardBatch.of(sequences)
    pack = context.runner.packs.get(batch.shapes)
    tokens = 512 if context.smoke else min(MAX_GRAPH_TOKENS, 4096)
    for how in (context.capture, lambda function: function):
        graphs = StepGraphs(context.runner.dit, graph.attend, how, tokens)
        if reason := captured(graphs, batch, pack):
            raise WrongResult(f"a graph could not be captured: {reason}")
        step = graphs.launch(batch, pack)
        assert step is not None
        found.append(step[0].clone())
    differ = float((found[0] != found[1]).sum())
    check(context, "equality", "graph vs eager", differ, 0.0, "elements", f"graph, {graph.name}")
