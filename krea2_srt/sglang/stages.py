"""The three stages of SGLang's pipeline, on our runner: one request from start to end.

For requests that SGLang's profiler looks at; all others go through the step scheduler.
"""

import numpy as np
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from sglang.multimodal_gen.runtime.utils.perf_logger import StageProfiler
from sglang.multimodal_gen.runtime.utils.profiler import SGLDiffusionProfiler

from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.model.pixels import to_uint8
from krea2_srt.request import RequestLimits
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import split_by_tokens
from krea2_srt.sglang.requests import image_requests

logger = init_logger(__name__)

_STATES = "krea2_states"


def states_of(batch: Req) -> list[DeviceState]:
    """What the encode stage made of a request, one for each of its images."""
    return batch.extra[_STATES]


class EncodeStage(PipelineStage):
    """Check the request, encode its prompts, sample its noise."""

    def __init__(self, runner: Krea2Runner) -> None:
        super().__init__()
        self.runner = runner
        self.limits = RequestLimits()

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        requests = image_requests(batch, self.limits)
        states = self.runner.encode_sequences([lone_sequence(request) for request in requests])
        self.runner.begin(states)
        batch.extra[_STATES] = states
        return batch


class DenoiseStage(PipelineStage):
    """Step all sequences of a request in packs."""

    def __init__(self, runner: Krea2Runner, max_pack_tokens: int) -> None:
        super().__init__()
        self.runner = runner
        self.max_pack_tokens = max_pack_tokens

    @property
    def role_affinity(self) -> RoleType:
        # SGLang counts request progress and step times in stages of this role.
        return RoleType.DENOISER

    def forward(self, batch: Req, server_args: ServerArgs) -> Req:
        with self.progress_bar(total=batch.num_inference_steps, batch=batch) as progress:
            while pending := [s for s in states_of(batch) if not s.done]:
                with StageProfiler(
                    f"denoising_step_{pending[0].step}",
                    logger=logger,
                    metrics=batch.metrics,
                    perf_dump_path_provided=batch.perf_dump_path is not None,
                    record_as_step=True,
                ):
                    tokens = [state.num_tokens for state in pending]
                    for pack in split_by_tokens(tokens, self.max_pack_tokens):
                        self.runner.step([pending[i] for i in pack])
                progress.update()
                if profiler := SGLDiffusionProfiler.get_instance():
                    profiler.step_denoising_step()
        return batch


class DecodeStage(PipelineStage):
    """Latents to pixels, in tiles of ``tile`` pixels a side (0: never)."""

    def __init__(self, runner: Krea2Runner, tile: int) -> None:
        super().__init__()
        self.runner = runner
        self.tile = tile

    def forward(self, batch: Req, server_args: ServerArgs) -> OutputBatch:
        # 8-bit here, rounded: SGLang would truncate, which darkens every picture by half a level.
        images: list[np.ndarray] = [
            to_uint8(self.runner.decode(state, self.tile)) for state in batch.extra.pop(_STATES)
        ]
        return OutputBatch(output=images, metrics=batch.metrics, usage=batch.usage)
