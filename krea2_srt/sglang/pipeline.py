"""SGLang's Krea 2 pipeline, served by our runner."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.pipelines.krea2 import Krea2Pipeline
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import (
    ComposedPipelineBase,
)
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE

from krea2_srt.runner.attention import choose_attention
from krea2_srt.runner.checkpoint import Krea2Checkpoint
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.vae import default_tile
from krea2_srt.sglang.attention import backends
from krea2_srt.sglang.options import unsupported_options
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

    runner: Krea2Runner
    tile: int
    attention: str

    def __new__(cls, model_path: str, server_args: ServerArgs, *args: Any, **kwargs: Any) -> Any:
        if options := unsupported_options(server_args):
            logger.warning(
                "krea2-srt: not supported yet: %s; SGLang's own Krea 2 implementation serves",
                ", ".join(options),
            )
            return Krea2Pipeline(model_path, server_args, *args, **kwargs)
        return super().__new__(cls)

    def load_modules(
        self, server_args: ServerArgs, loaded_modules: dict[str, torch.nn.Module] | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint into the runner; downloads it first where the path is a repo id."""
        del loaded_modules
        self._load_config()
        config = server_args.pipeline_config
        device = get_local_torch_device()
        dtype = PRECISION_TO_TYPE[config.dit_precision]
        attention = choose_attention(device, dtype, candidates=backends())
        self.attention = attention.name
        self.runner = Krea2Runner.load(
            Krea2Checkpoint.from_folder(Path(self.model_path)),
            device,
            dtype,
            text_dtype=PRECISION_TO_TYPE[config.text_encoder_precisions[0]],
            vae_dtype=PRECISION_TO_TYPE[config.vae_decode_precision or config.vae_precision],
            attention=attention,
            context_cache_bytes=_context_cache_bytes(server_args),
        )
        logger.info(
            "krea2-srt: our runner serves %s (%s, %s, %s, attention %s)",
            self.model_path,
            "Turbo" if self.runner.recipe.distilled else "Raw",
            device,
            dtype,
            self.attention,
        )
        # One module under a name that no checkpoint has: SGLang's sleep mode can move it, and its
        # weight updates, which would fill our fused matrices by SGLang's own names, refuse.
        parts = (self.runner.dit, self.runner.text_encoder.model, self.runner.vae)
        return {"krea2_runner": torch.nn.ModuleList(parts)}

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        self.add_stage(EncodeStage(self.runner), "krea2_encode_stage")
        self.add_stage(DenoiseStage(self.runner), "krea2_denoise_stage")
        # SGLang's default is off. Our tiles bound memory and leave the pixels alone, so only an
        # explicit "false" switches them off.
        explicit = server_args.is_arg_explicitly_set("vae_tiling")
        tiled = server_args.pipeline_config.vae_tiling or not explicit
        self.tile = default_tile(self.runner.device) if tiled else 0
        self.add_stage(DecodeStage(self.runner, self.tile), "krea2_decode_stage")


def _context_cache_bytes(server_args: ServerArgs) -> int:
    """SGLang's own options bound our prompt cache too."""
    if server_args.disable_conditioning_cache:
        return 0
    return int(server_args.conditioning_cache_max_size_mb * 2**20)
