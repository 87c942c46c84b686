"""How the engine runs: one validated object."""

import dataclasses
from dataclasses import dataclass

from krea2_srt.engine.policy import POLICIES
from krea2_srt.errors import ConfigError
from krea2_srt.request import RequestLimits

_CHECKED_APART = ("policy", "max_guidance", "turn_log")


@dataclass(frozen=True)
class EngineConfig:
    """Fields, with their units and bounds.

    Attributes:
        policy: ``srpt`` or ``edf``.
        max_turn_ms: no unit of work is planned to take longer.
        max_pack_tokens: most tokens in one forward; two 2048 x 2048 images by default. Memory of
            activations grows with it.
        max_pack_sequences: most sequences in one forward.
        max_active_sequences: sequences begun and not ended, whose latents are on the device, beyond
            which no further request is begun.
        max_paused_steps: most packs that may wait between two slices of a step; each holds its
            hidden states, 0.2 GB for a 2048 x 2048 image.
        max_queue_s: estimated seconds of work in the engine beyond which requests are refused.
        max_side, max_pixels, max_steps, max_images, max_guidance: of a request; see
            `RequestLimits`.
        turn_log: file that gets a line for each unit of work, see `krea2_srt.engine.turn_log`;
            "" writes none.
    """

    policy: str = "edf"
    max_turn_ms: float = 200.0
    max_pack_tokens: int = 2 * (2048 // 16) ** 2 + 2 * 512
    max_pack_sequences: int = 64
    max_active_sequences: int = 256
    max_paused_steps: int = 2
    max_queue_s: float = 120.0
    max_side: int = RequestLimits.max_side
    max_pixels: int = RequestLimits.max_pixels
    max_steps: int = RequestLimits.max_steps
    max_images: int = RequestLimits.max_images
    max_guidance: float = RequestLimits.max_guidance
    turn_log: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(f"policy: must be one of {known}, got {self.policy!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "max_guidance" and not 0 <= value < float("inf"):
                raise ConfigError(f"max_guidance: must be 0 or greater, got {value}")
            if field.name in _CHECKED_APART:
                continue
            if not 0 < value < float("inf"):
                raise ConfigError(f"{field.name}: must be greater than 0, got {value}")

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(
            self.max_side, self.max_pixels, self.max_steps, self.max_images, self.max_guidance
        )
