"""Schedules against Diffusers' scheduler, bit for bit."""

import numpy as np
import pytest

from krea2_srt.model.schedule import TURBO_MU, ResolutionShift, flow_schedule

STEPS = [1, 2, 7, 8, 28, 52, 100]


def diffusers_sigmas(steps: int, mu: float) -> list[float]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("steps", STEPS)
def test_turbo_equals_diffusers(steps):
    assert list(flow_schedule(steps, TURBO_MU).sigmas) == diffusers_sigmas(steps, TURBO_MU)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("image_tokens", [1, 256, 1024, 4096, 6400, 16384])
def test_raw_equals_diffusers(steps, image_tokens):
    from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

    mu = calculate_shift(image_tokens, 256, 6400, 0.5, 1.15)
    assert ResolutionShift().mu(image_tokens) == mu
    assert list(flow_schedule(steps, mu).sigmas) == diffusers_sigmas(steps, mu)


def test_a_schedule_falls_from_one_to_zero():
    sigmas = flow_schedule(8, TURBO_MU).sigmas
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert list(sigmas) == sorted(sigmas, reverse=True)
    assert len(set(sigmas)) == 9


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps"):
        flow_schedule(0, TURBO_MU)
