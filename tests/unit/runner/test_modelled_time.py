"""Modelled times: the roofline's on an H200, and uploads behind the work of other blocks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from krea2_srt.engine.cost import roofline
from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.known_gpus import known_gpu
from krea2_srt.runner.modelled_time import TEXT_TOKENS, picture_time

RESIDENT = SimpleNamespace(streamed_blocks=0, streamed_bytes=0, offloaded_bytes=0)
TOKENS = 4096 + TEXT_TOKENS


def modelled(name: str, format: str | None = None, plan=RESIDENT, guided=False):
    return picture_time(known_gpu(name), plan, Krea2Config(), format=format, steps=8, guided=guided)


def test_on_an_h200_in_bf16_it_is_the_roofline():
    found, prior = modelled("H200"), roofline()
    assert found.step_ms(1024) == pytest.approx(prior.step([TOKENS]), rel=0.01)
    # Reading the weights, which a small picture waits for.
    assert found.step_ms(64) == pytest.approx(prior.step([16 + TEXT_TOKENS]), rel=0.01)
    whole = 8 * prior.step([TOKENS]) + prior.decode(1024**2) + prior.encode(TEXT_TOKENS)
    assert found.picture_s(1024) == pytest.approx(whole / 1e3, rel=0.01)


def test_what_others_have_measured_is_not_far():
    """int8 takes 7.7 s a picture on a 3090, and 1 s for 2.48 steps on a 4090."""
    offloaded = SimpleNamespace(**{**vars(RESIDENT), "offloaded_bytes": 7.8e9})
    assert modelled("3090", "int8", offloaded).picture_s(1024) == pytest.approx(7.7, rel=0.15)
    assert 1e3 / modelled("4090", "int8").step_ms(1024) == pytest.approx(2.48, rel=0.15)


def test_8_bits_halve_products_and_weights_and_leave_attention():
    bf16, int8 = modelled("H200").cost, modelled("H200", "int8").cost
    assert int8.per_token < 0.75 * bf16.per_token
    assert int8.per_square == bf16.per_square
    assert int8.floor == bf16.floor / 2
    # GeForce cards multiply e4m3 with sums in float32 at half the rate of int8.
    assert modelled("4090", "fp8").cost.per_token == pytest.approx(
        2 * modelled("4090", "int8").cost.per_token, rel=0.01
    )


def test_guidance_takes_two_branches():
    assert modelled("H200", guided=True).step_ms(1024) == 2 * modelled("H200").step_ms(1024)


def test_uploads_hide_behind_large_steps_and_bound_small_ones():
    block = 434e6
    plan = SimpleNamespace(streamed_blocks=17, streamed_bytes=17 * block, offloaded_bytes=0)
    streamed, resident = modelled("4070", "int8", plan), modelled("4070", "int8")
    assert streamed.step_ms(2048) == pytest.approx(resident.step_ms(2048))
    uploads = 17 * block / known_gpu("4070").pcie * 1e3
    assert streamed.step_ms(256) == pytest.approx(uploads)
    assert resident.step_ms(256) < uploads


def test_an_encoder_on_the_host_comes_for_each_new_prompt():
    plan = SimpleNamespace(**{**vars(RESIDENT), "offloaded_bytes": 25e9})
    found, resident = modelled("4090", plan=plan), modelled("4090")
    encoding = resident.cost.encode(TEXT_TOKENS) / 1e3
    assert found.picture_s(512) - resident.picture_s(512) == pytest.approx(1 - encoding)
    assert replace(found, encoder_upload_ms=0.0).picture_s(512) == resident.picture_s(512)
