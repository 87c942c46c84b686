"""Between ways to do the same thing: each is tried against what it should give, then timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.runner.attention import Timer

TOLERANCE = 3e-2
"""Largest relative root mean square of a difference: roundings of bf16, and sums in Hopper's 14
bits. What is wrong differs by far more.
"""


@dataclass(frozen=True)
class Race:
    """Between ways on one device.

    Attributes:
        timer: milliseconds of a function's work on the device.
    """

    timer: Timer

    @torch.inference_mode()
    def fault(
        self, way: Callable[[], Tensor], expected: Tensor, tolerance: float = TOLERANCE
    ) -> str:
        """Why a way cannot be taken; empty where it can."""
        try:
            difference = (way().float() - expected.float()).norm() / expected.float().norm()
            found = difference.item()
        except Exception as error:
            # Kernels fail in many ways (import, JIT, launch); none may keep the server down.
            return first_line(error)
        return "" if found <= tolerance else f"differs by {found:.3g}"

    @torch.inference_mode()
    def ms(self, way: Callable[[], object]) -> float:
        """Time of a way."""
        return self.timer(way)
