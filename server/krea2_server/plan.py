"""krea2-serve --plan: what would fit on a GPU, and modelled times. No weights are read."""

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from krea2_server.settings import Settings
from krea2_server.sglang_options import SGLangOptions, parse_sglang_options
from krea2_srt.environment import read_environment
from krea2_srt.model.downloads import download
from krea2_srt.model.parts import find_parts
from krea2_srt.model.releases import RELEASES, TEXT_ENCODER_REPO, VAE_REPO, WEIGHTS
from krea2_srt.runner.known_gpus import KNOWN_GPUS, KnownGpu, known_by_device_name, known_gpu
from krea2_srt.runner.memory_sizes import GIB

if TYPE_CHECKING:
    from krea2_srt.runner.builder import RunnerBuilder
    from krea2_srt.runner.memory_plan import MemoryPlan

SIDES = (512, 1024, 2048)
"""Pixels a side of the pictures whose times are told."""


def plan_text(settings: Settings) -> str:
    """How the memory of ``settings.gpu``, or of the GPU that is here, would be used.

    Raises:
        ConfigError: the model does not fit, or a setting is wrong.
        CheckpointError: its configs are not there, or damaged.
    """
    # Here, so that a server's start does not wait for it.
    import torch

    known = known_gpu(settings.gpu) if settings.gpu else None
    if known is None and not torch.cuda.is_available():
        names = ", ".join(one.name for one in KNOWN_GPUS)
        return (
            "There is no GPU here: all would run on the CPU, in as much memory as it takes. "
            f"--gpu plans for one of {names}."
        )
    asked = parse_sglang_options(settings.sglang_options)
    with tempfile.TemporaryDirectory(prefix="krea2-plan-") as scratch:
        builder = _builder(settings, asked, Path(scratch))
        builder.lora_folder()  # a start would find out when all is loaded
        if known is not None:
            name, plan = known.name, builder.plan_for(known.gpu)
        else:
            name, found = torch.cuda.get_device_name(builder.device), builder.plan()
            assert found is not None
            plan, known = found, known_by_device_name(name)
        lines = [_head(settings, builder, name, plan), plan.report()]
        lines += _short_of_host(settings, plan)
        lines += [f"  not part of the plan: {option} of sglang_args" for option in asked.others]
        return "\n".join([*lines, _times(builder, known, plan)])


@dataclass(frozen=True)
class _ConfigRepos:
    """Repos of which only configs are downloaded, and of the released ones not even these.

    Attributes:
        scratch: where the released configs are written.
        revision: of the checkpoint's repo.
    """

    scratch: Path
    revision: str | None

    def layout(self, repo: str, without: Collection[str]) -> Path:
        if repo in RELEASES.values():
            return self._released(distilled=repo == RELEASES["oss_turbo"])
        parts = [part for part in WEIGHTS if part not in without]
        configs = [f"{part}/config.json" for part in parts]
        return download(repo, ["model_index.json", "scheduler/*", *configs], self.revision)

    def component(self, repo: str, part: str) -> Path:
        if repo in (TEXT_ENCODER_REPO, VAE_REPO):
            return self._released(distilled=True) / part
        return download(repo, ["config.json", f"{part}/config.json"])

    def _released(self, distilled: bool) -> Path:
        from krea2_srt.model.released import write_released_configs

        folder = self.scratch / ("turbo" if distilled else "raw")
        if not folder.exists():
            write_released_configs(folder, distilled)
        return folder


def _builder(settings: Settings, asked: SGLangOptions, scratch: Path) -> "RunnerBuilder":
    """What a scheduler process would load."""
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.model.quantization import sglang_quantization
    from krea2_srt.runner.builder import RunnerBuilder
    from krea2_srt.runner.caches import CacheBytes

    tokenizer = scratch / "tokenizer"  # of which nothing is read
    tokenizer.mkdir()
    source = settings.source
    if not source.tokenizer:
        source = replace(source, tokenizer=str(tokenizer))
    parts = find_parts(source, _ConfigRepos(scratch, asked.revision))
    environment = read_environment({**os.environ, **settings.scheduler_environment})
    runner = environment.runner
    if asked.text_encoder:
        runner = replace(runner, text_encoder=asked.text_encoder)
    quantization = None
    if asked.quantization:
        quantization = sglang_quantization(asked.quantization, asked.keep)
    caches = CacheBytes()
    if asked.context_cache_bytes is not None:
        caches = replace(caches, contexts=asked.context_cache_bytes)
    dit, text, vae = (getattr(torch, name) for name in asked.dtypes)
    return RunnerBuilder(
        Krea2Checkpoint.from_parts(parts),
        torch.device("cuda", 0),
        dit,
        text,
        vae,
        quantization,
        runner,
        caches,
        environment.engine,
    )


def _head(settings: Settings, builder: "RunnerBuilder", name: str, plan: "MemoryPlan") -> str:
    kind = "Turbo" if builder.checkpoint.sampling.distilled else "Raw"
    dtype = str(builder.dtype).removeprefix("torch.")
    if builder.quantization is not None:
        dtype += f" with {builder.quantization.format}"
    free, total = plan.free / GIB, plan.total / GIB
    return f"{settings.model_path} ({kind}, {dtype}) on {name}, {free:.1f} of {total:.1f} GiB free:"


def _short_of_host(settings: Settings, plan: "MemoryPlan") -> list[str]:
    """Whether this machine has less host memory than its engines would take."""
    from krea2_srt.runner.builder import host_memory_to_take

    needed = plan.pinned_bytes * settings.replicas / GIB
    there = host_memory_to_take() / GIB
    if needed <= there:
        return []
    who = f"{settings.replicas} engines need" if settings.replicas > 1 else "the engine needs"
    return [f"  host memory of this machine: {there:.1f} GiB can be taken, {who} {needed:.1f}"]


def _times(builder: "RunnerBuilder", known: KnownGpu | None, plan: "MemoryPlan") -> str:
    from krea2_srt.model.dit_files import dit_config
    from krea2_srt.runner.modelled_time import picture_time

    if known is None:
        return "How long pictures take there is not modelled."
    sampling = builder.checkpoint.sampling
    time = picture_time(
        known,
        plan,
        dit_config(builder.checkpoint.transformer),
        format=builder.quantization.format if builder.quantization else None,
        steps=sampling.default_steps,
        guided=not sampling.distilled,
    )
    limits = builder.within(plan).limits
    sides = [side for side in SIDES if side <= limits.max_side and side**2 <= limits.max_pixels]
    if not sides:
        return "No modelled picture is as small as the limits."
    told = ", ".join(f"{side}x{side} {time.picture_s(side):.1f} s" for side in sides)
    return f"A picture of {time.steps} steps, modelled and not measured: {told}."
