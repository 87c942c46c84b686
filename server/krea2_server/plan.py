"""krea2-serve --plan: what would fit on a GPU, and modelled times. No weights are read."""

import argparse
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from krea2_server.settings import Settings
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.host_memory import available_memory
from krea2_srt.model.downloads import download
from krea2_srt.model.parts import find_parts
from krea2_srt.model.releases import RELEASES, TEXT_ENCODER_REPO, VAE_REPO
from krea2_srt.runner.known_gpus import KNOWN_GPUS, KnownGpu, known_by_device_name, known_gpu

if TYPE_CHECKING:
    from krea2_srt.runner.builder import RunnerBuilder
    from krea2_srt.runner.memory_plan import MemoryPlan

SIDES = (512, 1024, 2048)
"""Pixels a side of the pictures whose times are told."""

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_GIB = 2**30


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
    asked = _sglang_options(settings.sglang_options)
    with tempfile.TemporaryDirectory(prefix="krea2-plan-") as scratch:
        builder = _builder(settings, asked, Path(scratch))
        if known is not None:
            name, plan = known.name, builder.plan_for(known.gpu)
        else:
            name, found = torch.cuda.get_device_name(builder.device), builder.plan()
            assert found is not None
            plan, known = found, known_by_device_name(name)
        lines = [_head(settings, builder, name, plan), plan.report()]
        lines += _short_of_host(settings, plan)
        lines += [f"  not part of the plan: {option}" for option in asked.others]
        return "\n".join([*lines, _times(builder, known, plan)])


@dataclass(frozen=True)
class _SGLangOptions:
    """What SGLang's options say of memory.

    Attributes:
        quantization: by name; "" is none.
        keep: names of matrices that stay as they are.
        text_encoder: ``offload``, ``resident``, or "" where none says it.
        dtypes: of the DiT, the text encoder and the VAE, torch's names.
        context_cache_bytes: of prompts; None is the default.
        revision: of the checkpoint's repo.
        others: that are not understood here.
    """

    quantization: str
    keep: tuple[str, ...]
    text_encoder: str
    dtypes: tuple[str, str, str]
    context_cache_bytes: int | None
    revision: str | None
    others: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"sglang_args: {message}")


def _sglang_options(options: Sequence[str]) -> _SGLangOptions:
    """As SGLang's own parser reads them, which takes a minute to import."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--quantization-ignored-layers", nargs="+", default=[])
    parser.add_argument("--text-encoder-cpu-offload", nargs="?", const="true", default="")
    parser.add_argument("--dit-precision", choices=_PRECISIONS, default="bf16")
    parser.add_argument(
        "--text-encoder-precisions", nargs="+", choices=_PRECISIONS, default=["bf16"]
    )
    parser.add_argument("--vae-precision", choices=_PRECISIONS, default="bf16")
    parser.add_argument("--vae-decode-precision", choices=_PRECISIONS)
    parser.add_argument("--conditioning-cache-max-size-mb", type=float)
    parser.add_argument("--disable-conditioning-cache", action="store_true")
    parser.add_argument("--revision")
    found, others = parser.parse_known_args(options)
    cache = found.conditioning_cache_max_size_mb
    offload = found.text_encoder_cpu_offload.lower()
    dtypes = (
        found.dit_precision,
        found.text_encoder_precisions[0],
        found.vae_decode_precision or found.vae_precision,
    )
    dit, text, vae = (_PRECISIONS[dtype] for dtype in dtypes)
    return _SGLangOptions(
        found.quantization,
        tuple(found.quantization_ignored_layers),
        {"": "", "true": "offload"}.get(offload, "resident"),
        (dit, text, vae),
        0 if found.disable_conditioning_cache else None if cache is None else int(cache * 2**20),
        found.revision,
        tuple(option for option in others if option.startswith("-")),
    )


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
        parts = [part for part in ("transformer", "text_encoder", "vae") if part not in without]
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


def _builder(settings: Settings, asked: _SGLangOptions, scratch: Path) -> "RunnerBuilder":
    """What a scheduler process would load."""
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.model.quantization import SGLANGS_WORDS, served
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
        quantization = served(SGLANGS_WORDS.get(asked.quantization, asked.quantization))
        if asked.keep:
            quantization = replace(quantization, keep=asked.keep)
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
    free, total = plan.free / _GIB, plan.total / _GIB
    return f"{settings.model_path} ({kind}, {dtype}) on {name}, {free:.1f} of {total:.1f} GiB free:"


def _short_of_host(settings: Settings, plan: "MemoryPlan") -> list[str]:
    """Whether this machine has less host memory than its engines would take."""
    needed, there = plan.pinned_bytes * settings.replicas / _GIB, available_memory() / _GIB
    if needed <= there:
        return []
    each = f"{settings.replicas} engines take" if settings.replicas > 1 else "the engine takes"
    return [f"  this machine has {there:.1f} GiB of host memory left, {each} {needed:.1f} of it"]


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
