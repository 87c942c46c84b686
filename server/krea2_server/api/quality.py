"""What a quality stands for: steps, and the size where a client leaves that to us."""

from dataclasses import dataclass

from krea2_srt.messages import ModelInfo
from krea2_srt.request import SIZE_MULTIPLE


@dataclass(frozen=True)
class Preset:
    """What a quality stands for.

    Attributes:
        label: as responses name it.
        steps: times the model's own number of steps.
        side: pixels of the square that ``auto`` generates.
    """

    label: str
    steps: float
    side: int


_LOW = Preset("low", 0.5, 512)
_MEDIUM = Preset("medium", 1.0, 1024)
_HIGH = Preset("high", 1.5, 1536)

PRESETS = {
    "low": _LOW,
    "medium": _MEDIUM,
    "high": _HIGH,
    "xhigh": Preset("xhigh", 2.0, 2048),
    "max": Preset("max", 3.0, 2048),
    "auto": _MEDIUM,
    # What OpenAI's older models called them.
    "standard": _MEDIUM,
    "hd": _HIGH,
}


def preset_of(quality: str | None) -> Preset:
    """What a request's quality stands for."""
    return PRESETS[quality or "auto"]


def steps_of(preset: Preset, model: ModelInfo) -> int:
    """Denoising steps, within the model's limits."""
    return max(1, min(round(preset.steps * model.default_steps), model.limits.max_steps))


def automatic_size(preset: Preset, model: ModelInfo) -> tuple[int, int]:
    """Width and height of the preset's square, or of the largest that the model was trained on and
    the limits allow.
    """
    limits = model.limits
    side = min(preset.side, model.trained_side, limits.max_side, int(limits.max_pixels**0.5))
    side -= side % SIZE_MULTIPLE
    return side, side
