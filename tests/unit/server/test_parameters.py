"""Defaults, limits and refusals of a request, before anything is sent to the engine."""

import dataclasses

import pytest
from pydantic import ValidationError

from krea2_server.api.parameters import resolve
from krea2_server.api.quality import PRESETS
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.app import as_api_error
from krea2_server.errors import ApiError
from krea2_srt.request import RequestLimits
from krea2_srt.testing.fake_engine import MODEL

RAW = dataclasses.replace(MODEL, distilled=False, default_steps=52, default_guidance=3.5)


def asked(**fields) -> ImageGenerationRequest:
    return ImageGenerationRequest.model_validate({"prompt": "a fox", **fields})


def resolved(model=MODEL, max_n=10, max_prompt=32_000, **fields):
    request = asked(**fields)
    return resolve(request, "id", model, max_n=max_n, max_prompt=max_prompt)


def test_defaults_are_the_models():
    turbo, raw = resolved(), resolved(RAW)
    assert (turbo.image.steps, turbo.image.guidance, turbo.image.size) == (8, 0.0, "1024x1024")
    assert (raw.image.steps, raw.image.guidance) == (52, 3.5)
    assert (turbo.output_format, turbo.quality) == ("png", 100)
    assert not turbo.progress
    assert not asked().wants_urls


def test_null_is_as_good_as_absent():
    fields = set(ImageGenerationRequest.model_fields) - {"prompt", "model"}
    nulls = resolved(**{**dict.fromkeys(fields), "seed": 1})
    assert nulls == resolved(seed=1)


@pytest.mark.parametrize(
    ("quality", "steps", "size"),
    [
        ("low", 4, "512x512"),
        ("medium", 8, "1024x1024"),
        ("auto", 8, "1024x1024"),
        ("standard", 8, "1024x1024"),
        ("high", 12, "1536x1536"),
        ("hd", 12, "1536x1536"),
        ("xhigh", 16, "2048x2048"),
        ("max", 24, "2048x2048"),
    ],
)
def test_a_quality_is_steps_and_a_size(quality, steps, size):
    found = resolved(quality=quality)
    assert (found.image.steps, found.image.size) == (steps, size)
    assert resolved(quality=quality, num_inference_steps=3).image.steps == 3
    assert resolved(quality=quality, size="256x512").image.size == "256x512"


def test_every_quality_fits_any_limits():
    small = dataclasses.replace(MODEL, limits=RequestLimits(max_side=500, max_pixels=200_000))
    for quality in PRESETS:
        image = resolved(small, quality=quality).image
        assert (image.width, image.height) == (432, 432)


def test_no_quality_is_larger_than_what_the_model_was_trained_on():
    demo = dataclasses.replace(MODEL, trained_side=256)
    assert {resolved(demo, quality=quality).image.size for quality in PRESETS} == {"256x256"}
    assert resolved(demo, size="512x512").image.size == "512x512"


def test_a_random_seed_is_chosen_where_none_is_given():
    seeds = {resolved().image.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert resolved(seed=2**63 - 1, n=10).image.seeds[-1] == 8


def test_width_and_height_are_another_way_to_say_size():
    assert resolved(width=512, height=256).image.size == "512x256"
    assert resolved(width=512, height=256, size="512x256").image.size == "512x256"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "255x255"}, "size"),
        ({"size": "0x0"}, "size"),
        ({"size": "-16x16"}, "size"),
        ({"size": "100000x100000"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "16x64"}, "size"),
        ({"size": "512"}, "size"),
        ({"size": "x"}, "size"),
        ({"size": "512X512"}, "size"),
        ({"size": "512x512x512"}, "size"),
        ({"size": "٥١٢x٥١٢"}, "size"),
        ({"size": ""}, "size"),
        ({"width": 512}, "height"),
        ({"height": 512}, "width"),
        ({"width": 100, "height": 64}, "width"),
        ({"width": 512, "height": 100}, "height"),
        ({"width": 512, "height": 0}, "height"),
        ({"width": 512, "height": 64}, "width"),
        ({"width": 64, "height": 512}, "height"),
        ({"width": 512, "height": 512, "size": "256x256"}, "size"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_inference_steps": 10**8}, "num_inference_steps"),
        ({"guidance_scale": 101.0}, "guidance_scale"),
        ({"negative_prompt": "blue"}, "negative_prompt"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "output_format": "png"}, "output_compression"),
        ({"partial_images": 1}, "partial_images"),
        ({"n": 4}, "n"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"negative_prompt": "x" * 101, "guidance_scale": 1}, "negative_prompt"),
    ],
)
def test_what_is_not_possible_names_its_field(fields, param):
    with pytest.raises(ApiError) as caught:
        resolved(max_n=3, max_prompt=100, **fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("background", "transparent", "unsupported_value"),
        ("output_format", "gif", "unsupported_value"),
        ("output_format", "svg", "unsupported_value"),
        ("style", "vivid", "unsupported_parameter"),
        ("image", "aGVsbG8=", "unsupported_parameter"),
        ("complexity", "high", "unsupported_parameter"),
    ],
)
def test_what_the_model_cannot_do_is_told(field, value, code):
    with pytest.raises(ValidationError) as caught:
        ImageGenerationRequest.model_validate({"prompt": "x", field: value})
    error = as_api_error(caught.value.errors())
    assert (error.status, error.param, error.code) == (400, field, code)
    assert "is not supported" in error.message


def test_the_identifier_of_a_user_may_have_its_older_name():
    assert asked(user="u").end_user == "u"
    assert asked(user="u", safety_identifier="s").end_user == "s"
    assert asked(user="u", safety_identifier="").end_user == "u"
