"""How long a picture would take on a GPU that nobody has measured: the roofline, scaled.

Data sheets' rates, times the share of an H200's that `krea2_srt.engine.cost` reckons with. Others
have measured int8 at 1024x1024: 7.7 s a picture on a 3090, and 2.48 steps a second on a 4090, where
this says 7.2 s and 2.8.
"""

from dataclasses import dataclass, replace

from krea2_srt.engine.cost import CostModel, roofline
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.runner.known_gpus import KnownGpu
from krea2_srt.runner.memory_plan import MemoryPlan

PRODUCT_SHARE, BANDWIDTH_SHARE = 790 / 989, 4.3 / 4.8
"""Shares of an H200's data sheet that `roofline` reckons with."""

EIGHT_BIT_SHARE = 0.58
"""Share of its rate of 8-bit products: 1150 of 1979 TFLOP/s, as benchmarks/gpu.py expects."""

TEXT_TOKENS = 64
"""A prompt of ordinary length."""


@dataclass(frozen=True)
class PictureTime:
    """Modelled times on one GPU with one plan.

    Attributes:
        cost: of work whose weights are on the GPU.
        steps: of a picture.
        branches: two with guidance.
        streamed_blocks: of the DiT.
        upload_ms: of one of them.
        encoder_upload_ms: of the text encoder, where it is offloaded.
    """

    cost: CostModel
    steps: int
    branches: int
    streamed_blocks: int
    upload_ms: float
    encoder_upload_ms: float

    def step_ms(self, side: int) -> float:
        """One step of a square picture alone, its blocks' uploads behind the others' work."""
        resident = self.cost.step([(side // 16) ** 2 + TEXT_TOKENS] * self.branches)
        if not self.streamed_blocks:
            return resident
        # From one streamed block to the next there is an even share of the step's work.
        share = resident / self.streamed_blocks
        return self.streamed_blocks * max(share, self.upload_ms)

    def picture_s(self, side: int) -> float:
        """From a new prompt to pixels."""
        text = max(self.cost.encode(self.branches * TEXT_TOKENS), self.encoder_upload_ms)
        return (text + self.steps * self.step_ms(side) + self.cost.decode(side * side)) / 1e3


def picture_time(
    gpu: KnownGpu,
    plan: MemoryPlan,
    config: Krea2Config,
    *,
    format: str | None,
    steps: int,
    guided: bool,
) -> PictureTime:
    """Times by a plan.

    Args:
        gpu: where.
        plan: how its memory is used.
        config: of the DiT.
        format: of its blocks: ``fp8``, ``int8``, or None for bf16.
        steps: of a picture.
        guided: whether each step has two branches.
    """
    products, attention = step_flops(config, [1])
    weights = step_weight_bytes(config) * (2 if format is None else 1)

    def at(rate: float) -> CostModel:
        return roofline(
            rate,
            gpu.bandwidth * BANDWIDTH_SHARE,
            flops_per_token=products,
            flops_per_squared_token=attention,
            weight_bytes=weights,
            blocks=config.num_layers,
        )

    cost = at(gpu.bf16 * PRODUCT_SHARE)
    if format is not None:
        eight_bit = at(gpu.rate(format) * EIGHT_BIT_SHARE)
        cost = replace(cost, per_token=eight_bit.per_token)
    count = plan.streamed_blocks
    return PictureTime(
        cost,
        steps,
        2 if guided else 1,
        count,
        plan.streamed_bytes / count / gpu.pcie * 1e3 if count else 0.0,
        plan.offloaded_bytes / gpu.pcie * 1e3,
    )
