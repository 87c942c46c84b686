"""How the engine runs: one validated object."""

from dataclasses import dataclass

from krea2_srt.engine.policy import POLICIES
from krea2_srt.request import RequestLimits
from krea2_srt.setting import check_settings, same_setting, setting


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings, each of which says what it is for."""

    policy: str = setting("edf", "order of requests", choices=tuple(POLICIES))
    max_turn_ms: float = setting(200.0, "planned milliseconds of the longest unit of work", above=0)
    max_pack_tokens: int = setting(
        2 * (2048 // 16) ** 2 + 2 * 512,
        "most tokens in one forward, by default two 2048x2048 images; bounds memory",
        above=0,
    )
    max_pack_sequences: int = setting(64, "most images in one forward", above=0)
    max_active_sequences: int = setting(
        256,
        "images begun and not ended, with latents on the device, beyond which no request is begun",
        above=0,
    )
    max_paused_steps: int = setting(
        2,
        "most packs that wait between two slices of a step; each holds 0.2 GB for a 2048x2048 "
        "image",
        above=0,
    )
    max_queue_s: float = setting(
        120.0,
        "estimated seconds of work in the engine beyond which requests are refused with 429",
        above=0,
    )
    max_side: int = same_setting(RequestLimits, "max_side")
    max_pixels: int = same_setting(RequestLimits, "max_pixels")
    max_steps: int = same_setting(RequestLimits, "max_steps")
    max_images: int = same_setting(RequestLimits, "max_images")
    max_guidance: float = same_setting(RequestLimits, "max_guidance")
    turn_log: str = setting(
        "",
        "file that gets a line of JSON for each unit of work, for krea2-bench report; replica "
        "i > 0 writes to FILE.i",
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(
            self.max_side, self.max_pixels, self.max_steps, self.max_images, self.max_guidance
        )
