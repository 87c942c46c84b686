"""Schedules: the sigmas a sequence steps through."""

import math
from dataclasses import dataclass

import numpy as np

TURBO_MU = 1.15
"""Shift that Turbo was distilled at, whatever the size."""


@dataclass(frozen=True)
class ResolutionShift:
    """Raw's shift: mu, linear in the number of image tokens through two points."""

    min_tokens: int = 256
    max_tokens: int = 6400
    min_mu: float = 0.5
    max_mu: float = 1.15

    def mu(self, image_tokens: int) -> float:
        slope = (self.max_mu - self.min_mu) / (self.max_tokens - self.min_tokens)
        return image_tokens * slope + (self.min_mu - slope * self.min_tokens)


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one sequence.

    Attributes:
        sigmas: steps + 1 values, falling from 1 to 0. Step i goes from sigmas[i] to sigmas[i + 1].
    """

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the DiT is told at each step, in [0, 1]."""
        return self.sigmas[:-1]


def flow_schedule(steps: int, mu: float) -> Schedule:
    """linspace(1, 1/steps, steps), shifted by exp(mu), then 0.

    In float32 and in this order of operations, so that every sigma equals that of Diffusers'
    FlowMatchEulerDiscreteScheduler to the last bit.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / grid - 1) ** 1.0)
    return Schedule((*(float(s) for s in shifted.astype(np.float32)), 0.0))
