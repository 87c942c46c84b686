"""The three stages of SGLang's pipeline, on our runner: one request from start to end.

For requests that SGLang's profiler looks at; all others go through the step scheduler.
"""

from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.perf_logger import StageProfiler
from sglang.multimodal_gen.runtime.utils.profiler import SGLDiffusionProfiler

from krea2_srt.request import RequestLimits
from krea2_srt.runner.generation import Generation
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.sglang.requests import image_requests

logger = init_logger(__name__)

_GENERATION = "krea2_generation"


def generation_of(batch: Req) -> Generation:
    """What the encode stage has begun for a request."""
    return batch.extra[_GENERATION]


class EncodeStage(PipelineStage):
    """Check the request, encode its prompts, sample its noise."""

    def __init__(self, runner: Krea2Runner) -> None:
        super().__init__()
        self.runner = runner
        self.limits = RequestLimits()

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        requests = image_requests(batch, self.limits)
        batch.extra[_GENERATION] = Generation(self.runner, requests)
        return batch


class DenoiseStage(PipelineStage):
    """Step all sequences of a request in packs."""

    def __init__(self, max_pack_tokens: int) -> None:
        super().__init__()
        self.max_pack_tokens = max_pack_tokens

    @property
    def role_affinity(self) -> RoleType:
        # SGLang counts request progress and step times in stages of this role.
        return RoleType.DENOISER

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        generation = generation_of(batch)
        with self.progress_bar(total=batch.num_inference_steps, batch=batch) as progress:
            while pending := generation.pending:
                with StageProfiler(
                    f"denoising_step_{pending[0].step}",
                    logger=logger,
                    metrics=batch.metrics,
                    perf_dump_path_provided=batch.perf_dump_path is not None,
                    record_as_step=True,
                ):
                    for pack in generation.packs(self.max_pack_tokens):
                        generation.step(pack)
                progress.update()
                if profiler := SGLDiffusionProfiler.get_instance():
                    profiler.step_denoising_step()
        return batch


class DecodeStage(PipelineStage):
    """Latents to pixels, in tiles of ``tile`` pixels a side (0: never)."""

    def __init__(self, tile: int) -> None:
        super().__init__()
        self.tile = tile

    def forward(self, batch: Req, server_args: ServerArgs) -> OutputBatch:
        # 8-bit here, rounded: SGLang would truncate, which darkens every picture by half a level.
        generation = batch.extra.pop(_GENERATION)
        images = [generation.pixels(state, self.tile) for state in generation.states]
        return OutputBatch(output=images, metrics=batch.metrics, usage=batch.usage)
