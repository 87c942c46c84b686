"""How the engine runs: one validated object, read once from the environment."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

from krea2_srt.engine.policy import POLICIES
from krea2_srt.engine.request import RequestLimits
from krea2_srt.errors import ConfigError

PREFIX = "KREA2_SRT_"
"""Environment variables are this and the field's name in capitals, KREA2_SRT_MAX_TURN_MS."""


@dataclass(frozen=True)
class EngineConfig:
    """Fields, with their units and bounds.

    Attributes:
        policy: ``fcfs``, ``srpt`` or ``edf``.
        max_turn_ms: no unit of work is planned to take longer.
        max_pack_tokens: most tokens in one forward; two 2048 x 2048 images by default. Memory of
            activations grows with it.
        max_pack_sequences: most sequences in one forward.
        max_active_sequences: sequences begun and not ended, whose latents are on the device, beyond
            which no further request is begun.
        max_held_steps: most packs that may wait between two slices of a step; each holds its
            hidden states, 0.2 GB for a 2048 x 2048 image.
        max_queue_s: estimated seconds of work in the engine beyond which requests are refused.
        max_side, max_pixels, max_steps, max_images, max_guidance: of a request; see
            `RequestLimits`.
    """

    policy: str = "edf"
    max_turn_ms: float = 200.0
    max_pack_tokens: int = 2 * (2048 // 16) ** 2 + 2 * 512
    max_pack_sequences: int = 64
    max_active_sequences: int = 256
    max_held_steps: int = 2
    max_queue_s: float = 120.0
    max_side: int = RequestLimits.max_side
    max_pixels: int = RequestLimits.max_pixels
    max_steps: int = RequestLimits.max_steps
    max_images: int = RequestLimits.max_images
    max_guidance: float = RequestLimits.max_guidance

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(f"policy: must be one of {known}, got {self.policy!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "max_guidance" and not 0 <= value < float("inf"):
                raise ConfigError(f"max_guidance: must be 0 or greater, got {value}")
            if field.name not in ("policy", "max_guidance") and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name}: must be greater than 0, got {value}")

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(
            self.max_side, self.max_pixels, self.max_steps, self.max_images, self.max_guidance
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "EngineConfig":
        """Read ``KREA2_SRT_*``.

        Raises:
            ConfigError: naming the variable whose value is wrong, or that is unknown.
        """
        default = cls()
        fields = {f.name: type(getattr(default, f.name)) for f in dataclasses.fields(cls)}
        values: dict[str, str | int | float] = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in fields:
                known = ", ".join(sorted(PREFIX + f.upper() for f in fields))
                raise ConfigError(f"{variable}: is not known; known are {known}")
            try:
                values[name] = fields[name](text)
            except ValueError:
                kind = "a whole number" if fields[name] is int else "a number"
                raise ConfigError(f"{variable}: must be {kind}, got {text!r}") from None
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ConfigError as error:
            name, _, rest = str(error).partition(":")
            raise ConfigError(f"{PREFIX}{name.upper()}:{rest}") from None
