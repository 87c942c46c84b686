"""Whether a step really runs on a graph, and if not, why."""

from krea2_srt.model.pack import Pack
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.graphs import StepGraphs
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch


def captured(graphs: StepGraphs, batch: ForwardBatch, pack: Pack, steps: int = 1) -> str:
    """Capture the graph of a pack; empty, or why there is none."""
    if graphs.prepare(batch, pack, steps):
        return ""
    return next(reversed(graphs.failures.values()), "it is too large for any graph")


def how_it_runs(runner: Krea2Runner, tokens: int, graph: bool) -> str:
    """On a graph or eagerly, with which attention, and whether its MLPs are one kernel less."""
    attention = runner.attention.graph if graph else runner.attention.eager
    assert attention is not None
    fused = tokens >= runner.dit.operations.fused_mlp_tokens
    return f"{'graph' if graph else 'eager'}, {attention.name}" + (", fused MLP" if fused else "")


def why_eager(runner: Krea2Runner, states: list[DeviceState], steps: int = 1) -> str:
    """Capture what a runner's step would replay; empty, or why it will run eagerly."""
    if runner.graphs is None:
        return f"attention {runner.attention.name} cannot be captured"
    batch = ForwardBatch.of(states)
    return captured(runner.graphs, batch, runner.packs.get(batch.shapes), steps)
