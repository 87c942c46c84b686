"""Plans of the released model on known GPUs, as a table for the docs. All of it is modelled."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from krea2_srt.errors import ConfigError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.quantization import SERVED
from krea2_srt.model.released import write_released_configs
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.given_up import square_side
from krea2_srt.runner.known_gpus import KNOWN_GPUS, KnownGpu
from krea2_srt.runner.memory_plan import MemoryPlan
from krea2_srt.runner.modelled_time import picture_time

FORMATS = {name: SERVED[name] if name else None for name in (None, *SERVED)}
"""Formats of the blocks; None is bf16."""

LARGEST_SIDE, SIDE = 2048, 1024
STEPS = 8


def released_plans() -> Iterator[tuple[KnownGpu, str | None, MemoryPlan | ConfigError]]:
    """The plan of Turbo on each known GPU in each format, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        write_released_configs(Path(folder), distilled=True)
        found = Krea2Checkpoint.from_folder(Path(folder))
        cuda, dtype = torch.device("cuda"), torch.bfloat16
        plain = RunnerBuilder(found, cuda, dtype, dtype, dtype)
        builders = {name: replace(plain, quantization=q) for name, q in FORMATS.items()}
        sizes = {name: builder.sizes() for name, builder in builders.items()}
        for known in KNOWN_GPUS:
            for name, builder in builders.items():
                try:
                    yield known, name, builder.plan_for(known.gpu, sizes=sizes[name])
                except ConfigError as error:
                    yield known, name, error


def plan_table() -> str:
    """A row for each GPU, a cell for each format: what does not fit, and modelled seconds."""
    cells: dict[KnownGpu, list[str]] = {}
    for known, format, plan in released_plans():
        cells.setdefault(known, []).append(_cell(known, format, plan))
    formats = " | ".join(format or "bf16" for format in FORMATS)
    lines = [f"| GPU | memory, GiB | {formats} |", "|" + " --- |" * (2 + len(FORMATS))]
    for known, row in sorted(cells.items(), key=lambda item: item[0].memory_gib):
        lines.append(f"| {known.name} | {known.memory_gib:.1f} | {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(known: KnownGpu, format: str | None, plan: MemoryPlan | ConfigError) -> str:
    if isinstance(plan, ConfigError):
        return "no fp8" if format == "fp8" and not known.fp8 else "refused"
    config = Krea2Config()
    time = picture_time(known, plan, config, format=format, steps=STEPS, guided=False)
    seconds = time.picture_s(SIDE)
    said = ", ".join(_short(plan, config.num_layers)) or "everything fits"
    return f"{said}; {seconds:.{0 if seconds >= 10 else 1}f} s"


def _short(plan: MemoryPlan, blocks: int) -> Iterator[str]:
    """What users notice of what is given up."""
    side = square_side(plan.max_image_tokens)
    if side < LARGEST_SIDE:
        yield f"up to {side}x{side}"
    if plan.streamed_blocks:
        yield f"{plan.streamed_blocks} of {blocks} blocks and the encoder on the host"
        return
    if not plan.text_encoder_resident:
        yield "encoder on the host"
    if not plan.max_graph_tokens:
        yield "no graphs"
    if plan.overlapped_decodes < 2:
        yield "one decode at a time"
