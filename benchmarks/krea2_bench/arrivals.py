"""When requests arrive: sorted times in seconds, from a count, a mean rate and a generator."""

import numpy as np

DIURNAL_PERIOD_S = 1800.0
DIURNAL_AMPLITUDE = 0.3
"""A day, shortened, and by which part of its mean the rate swings in it."""


def poisson(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Arrivals that know nothing of each other."""
    return np.cumsum(rng.exponential(size=count)) / rate


def gamma(count: int, rate: float, rng: np.random.Generator, burstiness: float) -> np.ndarray:
    """Gamma-distributed times between arrivals.

    Args:
        count: of arrivals.
        rate: mean, in arrivals a second.
        rng: what draws them.
        burstiness: the gamma distribution's shape, as other load generators call it: 1 is Poisson,
            less comes in clusters and gaps, more is more even. The coefficient of variation of
            the times between arrivals is its inverse square root.
    """
    return np.cumsum(rng.gamma(burstiness, 1 / burstiness, size=count)) / rate


def constant(count: int, rate: float) -> np.ndarray:
    """Arrivals like a clock's, the first at once."""
    return np.arange(count) / rate


def diurnal(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson arrivals whose rate is a sine around its mean."""
    expected = np.cumsum(rng.exponential(size=count))
    omega = 2 * np.pi / DIURNAL_PERIOD_S
    # Beyond the mean time of the last arrival by what the sine can hold back.
    end = expected[-1] / rate + 2 * DIURNAL_AMPLITUDE / omega
    times = np.linspace(0, end, max(10_000, int(end)))
    integral = rate * (times + DIURNAL_AMPLITUDE * (1 - np.cos(omega * times)) / omega)
    return np.interp(expected, integral, times)
