"""What is to be known of a GPU before anything runs there."""

from dataclasses import dataclass

from krea2_srt.errors import ConfigError

CAPABILITIES = {"int8": ((8, 0), "Ampere"), "fp8": ((8, 9), "Ada")}
"""By format, the first GPUs that multiply it: compute capability, and name. Older ones have
instructions for int8 too, but none for the bfloat16 beside it.
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU, at hand or not.

    Attributes:
        free, total: bytes of its memory.
        capability: its compute capability.
    """

    free: int
    total: int
    capability: tuple[int, int]


def check_capability(format: str, capability: tuple[int, int]) -> None:
    """Check that a GPU multiplies a format of 8 bits.

    Args:
        format: one of `CAPABILITIES`.
        capability: the GPU's compute capability.

    Raises:
        ConfigError: it does not, and which format it does.
    """
    needed, name = CAPABILITIES[format]
    if capability >= needed:
        return
    problem = (
        f"quantization: {format} needs a GPU of compute capability {needed[0]}.{needed[1]} "
        f"({name}) or newer, this one has {capability[0]}.{capability[1]}"
    )
    others = [other for other, (least, _) in CAPABILITIES.items() if capability >= least]
    raise ConfigError("; ".join([problem, *(f"it can have {other}" for other in others)]))
