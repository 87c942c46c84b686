"""What one image has on the device."""

from dataclasses import dataclass

from torch import Tensor

from krea2_srt.model.schedule import Schedule
from krea2_srt.runner.schedule_modulation import ScheduleModulation


@dataclass
class DeviceState:
    """One image on its way from noise to latents.

    Attributes:
        context: [text tokens, hidden], the fused prompt.
        negative_context: the same of the negative prompt; None without guidance.
        guidance: v = cond + guidance * (cond - uncond).
        rows, columns: image tokens.
        schedule: its sigmas.
        modulation: the DiT's, a row per step of the schedule; it is not held here.
        tokens: float32 [rows * columns, 64], the noisy patches at the current step.
        step: steps already done.
        keep_velocity: whether `velocity` is kept, for previews.
        velocity: of the last step, like tokens.
    """

    context: Tensor
    negative_context: Tensor | None
    guidance: float
    rows: int
    columns: int
    schedule: Schedule
    modulation: ScheduleModulation
    tokens: Tensor
    step: int = 0
    keep_velocity: bool = False
    velocity: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.step == self.schedule.steps

    @property
    def num_tokens(self) -> int:
        """Tokens that its next forward takes, both branches under guidance."""
        return sum(len(context) + self.rows * self.columns for context in self.branches)

    @property
    def branches(self) -> list[Tensor]:
        """Contexts of its forwards: one, or two under guidance."""
        if self.negative_context is None:
            return [self.context]
        return [self.context, self.negative_context]
