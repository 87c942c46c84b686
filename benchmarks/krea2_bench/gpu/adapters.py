"""Steps with an adapter beside the model, in turn with the same without."""

import torch

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.rows import timed
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.steps import ways
from krea2_bench.gpu.timing import timings
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.lora.placed import AdapterSet
from krea2_srt.lora.slots import AdapterSlots
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.matrices import dit_matrices
from krea2_srt.runner.memory_choices import MAX_GRAPH_TOKENS

SIDES, SMOKE_SIDES = (1024, 512), (32,)
RANK = 32
WITH = f"with an adapter of rank {RANK}"


def run(context: Context) -> None:
    """An adapter changes all matrices that a step multiplies with."""
    for side in SMOKE_SIDES if context.smoke else SIDES:
        with context.findings.attempt("adapters", name_of(side)):
            _measure(context, side)


def _measure(context: Context, side: int) -> None:
    # A runner of its own, since its graphs know slots.
    runner = context.runner_of(context.dit)
    placed = runner.adapters.add(random_adapter(runner.dit, RANK))
    if runner.attention.graph is not None:
        slots = AdapterSlots(runner.dit, RANK) if context.on_gpu else None
        runner.use_graphs(context.capture, MAX_GRAPH_TOKENS, adapter_slots=slots)
    size = name_of(side)
    works = []
    for name, adapters in (("", AdapterSet()), (f"{WITH} ", AdapterSet.of((placed, 1.0)))):
        states = images(runner, ((side, side),))
        for state in states:
            state.adapters = adapters
        works += ways(context, "adapters", runner, states, f"{size} {name}")
    found = timings(
        [way.run for way in works], context.device, context.seconds, warm_ups=2, least=3
    )
    for way, timing in zip(works, found, strict=True):
        context.findings.add(timed("adapters", way.name, timing, None, "", way.how))


def random_adapter(dit: Krea2DiT, rank: int) -> Adapter:
    """One that changes every matrix of every step."""
    generator = torch.Generator(dit.img_in.weight.device).manual_seed(rank)

    def factors(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        def random(*shape: int) -> torch.Tensor:
            device = dit.img_in.weight.device
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        return random(rank, width) / width**0.5, random(rows, rank) * 0.01

    found: dict[str, list[Factor]] = {}
    for matrix in dit_matrices(dit.config).values():
        if matrix.linear.startswith(("blocks.", "img_in", "final_linear")):
            down, up = factors(*matrix.shape)
            found.setdefault(matrix.linear, []).append(Factor(down.cpu(), up.cpu(), matrix.start))
    in_order = {name: tuple(sorted(some, key=lambda f: f.start)) for name, some in found.items()}
    return Adapter(f"rank-{rank}", f"random of rank {rank}", in_order)
