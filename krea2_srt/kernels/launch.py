"""How kernels are launched: warps and tokens per program, by kernel and device.

``krea2_bench.tune_kernels`` searches them on a GPU and stores them in ``configs/``, by the GPU's
name; a GPU without a file has the defaults. Nothing is searched when serving.
"""

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched on one device.

    Attributes:
        num_warps: of a program. Sums over a token are split over them, so that another number
            gives other roundings: it never depends on how many tokens there are.
        tokens: most consecutive tokens of a program.
    """

    num_warps: int
    tokens: int = 1


DEFAULTS = {
    "norm": Launch(8, 4),
    "norm_8bit": Launch(16, 4),
    "qk_norm_rope": Launch(8, 1),
    "sigmoid_gate": Launch(4, 1),
    # With fewer warps Triton 3.6 cannot build the rotated one for sm_100.
    "sigmoid_gate_8bit": Launch(16, 1),
    "silu_mul": Launch(4, 1),
    "silu_mul_8bit": Launch(16, 1),
    "quantize_8bit": Launch(16, 1),
    "final_layer": Launch(4, 16),
    "euler": Launch(4, 32),
    "channel_norm": Launch(4, 1),
}
"""For devices without a file. Those of 8 bits serve fp8 and int8: they move the same bytes."""

_FORMER_NAMES = {name.replace("_8bit", "_fp8"): name for name in DEFAULTS if "_8bit" in name}
"""What files from before int8 call them."""


@dataclass(frozen=True)
class Device:
    """What launches need to know of a device.

    Attributes:
        processors: that run programs side by side.
        launches: by kernel; only a search changes them.
    """

    processors: int
    launches: dict[str, Launch]

    def launch(self, kernel: str, tokens: int) -> tuple[Launch, int]:
        """The launch of a kernel, and how many tokens each program takes: fewer where there are
        too few tokens to give every processor some programs.
        """
        launch = self.launches[kernel]
        return launch, max(1, min(launch.tokens, tokens // (4 * self.processors)))


def config_file(name: str) -> Path:
    """The file of a device's launches."""
    return FOLDER / f"{name.replace(' ', '_').replace('/', '_')}.json"


def device_of(device: torch.device) -> Device:
    """What is known of a device; ``cuda`` without a number is the current one."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _known(device)


@cache
def _known(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter
        return Device(1, dict(DEFAULTS))
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, read_launches(config_file(properties.name)))


def read_launches(file: Path) -> dict[str, Launch]:
    """The launches in a file, and the default of what it does not name.

    A file that holds something that no kernel could be launched with, such as one of another
    version, is passed over whole, and the log says so.
    """
    if not file.is_file():
        return dict(DEFAULTS)
    try:
        stored = json.loads(file.read_text())
        found = {
            _FORMER_NAMES.get(name, name): Launch(**values)
            for name, values in stored["launches"].items()
        }
        for name, launch in found.items():
            _check(name, launch)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("krea2-srt: %s is passed over, defaults launch: %s", file, reason)
        return dict(DEFAULTS)
    return DEFAULTS | found


def _check(kernel: str, launch: Launch) -> None:
    if kernel not in DEFAULTS:
        raise ValueError(f"no kernel is called {kernel!r}")
    for name, most in (("num_warps", 32), ("tokens", 1024)):
        value = getattr(launch, name)
        if type(value) is not int or not 0 < value <= most or value & (value - 1):
            raise ValueError(f"{kernel}: {name} must be a power of two up to {most}, got {value!r}")
