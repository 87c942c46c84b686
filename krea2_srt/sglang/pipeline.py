"""SGLang's Krea 2 pipeline, served by our runner."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.pipelines.krea2 import Krea2Pipeline
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import (
    ComposedPipelineBase,
)
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.hf_diffusers_utils import maybe_download_model
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE
from sglang.srt.environ import envs

from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import read_environment
from krea2_srt.errors import AdapterError, CheckpointError, ConfigError
from krea2_srt.lora.library import AdapterLibrary
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.hub import find_checkpoint, layout_patterns, released_folder
from krea2_srt.model.vae import default_tile
from krea2_srt.runner.builder import RunnerBuilder
from krea2_srt.runner.caches import CacheBytes
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.memory_plan import MemoryPlan
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.sglang.adapters import adapters_of
from krea2_srt.sglang.attention import backends
from krea2_srt.sglang.commands import USERS, ending_in_a_line
from krea2_srt.sglang.options import (
    check_quantization_of_sglang,
    is_server,
    quantization_of,
    unsupported_options,
)
from krea2_srt.sglang.parts import refuse_single_files, source_of
from krea2_srt.sglang.products import products
from krea2_srt.sglang.stages import DecodeStage, DenoiseStage, EncodeStage

logger = init_logger(__name__)


class Krea2RunnerPipeline(ComposedPipelineBase):
    """Encode, denoise and decode on `Krea2Runner`.

    Constructed with an option that the runner would have to ignore, it is SGLang's own pipeline
    instead: SGLang constructs whatever class is registered, and this is the first place that sees
    both the class and the options.
    """

    pipeline_name = "Krea2Pipeline"
    _required_config_modules: ClassVar[list[str]] = [
        "text_encoder",
        "tokenizer",
        "vae",
        "transformer",
        "scheduler",
    ]

    model_path: str
    runner: Krea2Runner
    tile: int
    attention: str
    plan: MemoryPlan | None
    adapters: AdapterLibrary | None
    any_adapter_path: bool
    engine_config: EngineConfig

    def __new__(cls, model_path: str, server_args: ServerArgs, *args: Any, **kwargs: Any) -> Any:
        options = unsupported_options(server_args)
        with ending_in_a_line(AdapterError, CheckpointError, ConfigError):
            if not options and not server_args.model_subfolder:
                options = paged_by_sglang(find(model_path, server_args), server_args)
            if options:
                refuse_single_files(model_path, server_args, options)
                check_quantization_of_sglang(server_args, options)
            if options and not server_args.model_subfolder:
                # In place of the repo's name, by which SGLang would download all that is in it.
                model_path = str(local_folder(model_path, server_args))
        if options:
            logger.warning(
                "krea2-srt: not supported yet: %s; SGLang's own Krea 2 implementation serves",
                ", ".join(options),
            )
            with ending_in_a_line(ConfigError):
                for name in ("lora_merge", "recipe"):
                    if getattr(read_environment().runner, name) != getattr(RunnerConfig(), name):
                        raise ConfigError(
                            f"KREA2_SRT_{name.upper()}: SGLang's own Krea 2 knows no such setting"
                        )
            # Such as a component that is not there.
            what = f"SGLang's own Krea 2 does not start with {', '.join(options)}: "
            with ending_in_a_line(*USERS, SafetensorError, what=what):
                return Krea2Pipeline(model_path, server_args, *args, **kwargs)
        return super().__new__(cls)

    def load_modules(
        self, server_args: ServerArgs, loaded_modules: dict[str, torch.nn.Module] | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint into the runner."""
        del loaded_modules
        with ending_in_a_line(AdapterError, CheckpointError, ConfigError):
            # In place of SGLang's `_load_config`, which would have all that is in a repo.
            builder = make_builder(find(self.model_path, server_args), server_args)
            self.plan = builder.plan()
            self.engine_config = builder.within(self.plan)
            self.adapters, self.any_adapter_path = None, False
            self.runner = builder.load(self.plan, backends(), products(builder.quantization))
            if is_server(server_args):
                self.any_adapter_path = builder.config.lora_any_path == "on"
                self.adapters = builder.adapter_library(self.runner)
        self.attention = self.runner.attention.name
        logger.info(
            "krea2-srt: our runner serves %s (%s, %s, %s%s, attention %s)",
            self.model_path,
            "Turbo" if self.runner.sampling.distilled else "Raw",
            builder.device,
            builder.dtype,
            f" with {builder.quantization.format}" if builder.quantization else "",
            self.attention,
        )
        # One module under a name that no checkpoint has: SGLang's sleep mode can move it, and its
        # weight updates, which would fill our fused matrices by SGLang's own names, refuse.
        parts = [self.runner.dit, self.runner.vae]
        if self.runner.text_encoder.resident:  # otherwise it is on the host anyway
            parts.append(self.runner.text_encoder.model)
        return {"krea2_runner": torch.nn.ModuleList(parts)}

    @property
    def speed(self) -> str:
        """All that changes how long work takes, for who remembers it."""
        runner = self.runner
        quantization = runner.dit.quantization
        graphs = "graphs" if runner.graphs is not None else "eager"
        parts = [self.attention, runner.dit.operations.name, graphs, quantization]
        if streamed := len(runner.dit.host_blocks):
            parts.append(f"{streamed} blocks streamed")
        return " ".join(map(str, parts))

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        self.add_stage(EncodeStage(self.runner), "krea2_encode_stage")
        self.add_stage(DenoiseStage(self.engine_config.max_pack_tokens), "krea2_denoise_stage")
        # SGLang's default is off. Our tiles bound memory and leave the pixels alone, so only an
        # explicit "false" switches them off.
        explicit = server_args.is_arg_explicitly_set("vae_tiling")
        tiled = server_args.pipeline_config.vae_tiling or not explicit
        self.tile = default_tile(self.runner.device) if tiled else 0
        self.add_stage(DecodeStage(self.tile), "krea2_decode_stage")


def make_builder(checkpoint: Krea2Checkpoint, server_args: ServerArgs) -> RunnerBuilder:
    """What SGLang's options and the environment ask for.

    Raises:
        AdapterError, CheckpointError, ConfigError: something of it is wrong.
    """
    config = server_args.pipeline_config
    environment = read_environment()
    runner = environment.runner
    if server_args.is_arg_explicitly_set("text_encoder_cpu_offload"):
        where = "offload" if server_args.text_encoder_cpu_offload else "resident"
        runner = replace(runner, text_encoder=where)
    if not is_server(server_args):
        runner = replace(runner, warm_up_s=0.0)
    return RunnerBuilder(
        checkpoint,
        get_local_torch_device(),
        PRECISION_TO_TYPE[config.dit_precision],
        PRECISION_TO_TYPE[config.text_encoder_precisions[0]],
        PRECISION_TO_TYPE[config.vae_decode_precision or config.vae_precision],
        quantization_of(server_args),
        runner,
        CacheBytes(contexts=_context_cache_bytes(server_args)),
        environment.engine,
        adapters_of(server_args),
    )


def find(model_path: str, server_args: ServerArgs) -> Krea2Checkpoint:
    """The checkpoint that SGLang's options name; downloads what the runner reads of a repo that is
    not on disk.

    Raises:
        CheckpointError: something of it is not there, or cannot be downloaded.
        ConfigError: two options name the same part.
    """
    source = source_of(model_path, server_args)
    model = source.model
    if envs.SGLANG_USE_MODELSCOPE.get() and not Path(model).exists():
        model = str(local_folder(model, server_args, tuple(source.given)))
    return find_checkpoint(
        model, recipe=source.recipe, **source.given, revision=server_args.revision, cached=True
    )


def local_folder(model_path: str, server_args: ServerArgs, without: Sequence[str] = ()) -> Path:
    """The folder of a whole checkpoint; downloads it where it is not on disk.

    Args:
        without: parts that come from elsewhere, which only ModelScope's client leaves out.

    Raises:
        CheckpointError: nothing there, or it cannot be downloaded.
    """
    if envs.SGLANG_USE_MODELSCOPE.get() and not Path(model_path).is_dir():
        folder = maybe_download_model(
            model_path,
            allow_patterns=layout_patterns(without),
            force_diffusers_model=True,
            revision=server_args.revision,
        )
        return Path(folder)
    return released_folder(model_path, server_args.revision)


def paged_by_sglang(checkpoint: Krea2Checkpoint, server_args: ServerArgs) -> list[str]:
    """Whether SGLang has decided, by itself, to page the DiT in and out, and it does not fit.

    Our runner keeps it on the GPU.

    Returns:
        That in words, or nothing.
    """
    mode = server_args.residency_mode("transformer")
    if mode == "resident":
        return []
    try:
        make_builder(checkpoint, server_args).plan()
    except ConfigError as error:
        return [f"transformer {mode} ({error})"]
    return []


def _context_cache_bytes(server_args: ServerArgs) -> int:
    """SGLang's own options bound our prompt cache too."""
    if server_args.disable_conditioning_cache:
        return 0
    return int(server_args.conditioning_cache_max_size_mb * 2**20)
