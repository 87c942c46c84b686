"""From SGLang's requests to ours, on SGLang's real request objects."""

import dataclasses

import pytest

from krea2_srt.errors import RequestError
from krea2_srt.request import RequestLimits


def images(batch):
    from krea2_srt.sglang.requests import image_requests

    return image_requests(batch, RequestLimits())


def test_fields_and_defaults(make_req):
    (image,) = images(make_req())
    assert (image.width, image.height, image.steps, image.guidance) == (1024, 1024, 8, 0.0)
    fields = {"width": 512, "height": 256, "num_inference_steps": 4, "seed": 9}
    (image,) = images(make_req(**fields, guidance_scale=4.5, negative_prompt="rain"))
    assert (image.width, image.height, image.steps, image.seed) == (512, 256, 4, 9)
    assert (image.guidance, image.negative_prompt) == (3.5, "rain")


def test_n_images_are_n_requests_with_consecutive_seeds(make_req):
    assert [image.seed for image in images(make_req(num_outputs_per_prompt=3, seed=5))] == [5, 6, 7]
    listed = make_req(num_outputs_per_prompt=2, seed=[40, 2])
    assert [image.seed for image in images(listed)] == [40, 2]


def test_several_prompts_share_the_seeds(make_req):
    batch = make_req(num_outputs_per_prompt=1, seed=1)
    batch.prompt = ["a", "b"]
    assert [(i.prompt, i.seed) for i in images(batch)] == [("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_outputs_per_prompt", 0),
        ("num_outputs_per_prompt", 10**9),
        ("num_inference_steps", 0),
        ("guidance_scale", float("nan")),
        ("guidance_scale", 1e9),
        ("width", -255),
        ("seed", -1),
        ("prompt", "\ud800"),
    ],
)
def test_a_bad_value_names_sglangs_field(make_req, field, value):
    batch = make_req()
    setattr(batch, field, value)
    with pytest.raises(RequestError) as error:
        images(batch)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_teacache", True),
        ("enable_cache_dit", True),
        ("cache_dit_params", {"Fn": 1}),
        ("attention_backend_override", "fa"),
        ("cfg_gate_step", 0.5),
        ("true_cfg_scale", 4.0),
        ("true_cfg_scale", 0),
        ("guidance_rescale", 0.7),
        ("return_trajectory_latents", True),
        ("rollout", True),
        ("image_path", "some.png"),
        ("flow_shift", 3.0),
        ("max_sequence_length", 64),
        ("progressive_mode", "dct"),
        ("diffusers_kwargs", {"a": 1}),
    ],
)
def test_a_field_that_the_runner_does_not_implement_is_refused(make_req, field, value):
    batch = make_req()
    setattr(batch.sampling_params, field, value)
    with pytest.raises(RequestError, match="KREA2_SRT=off") as error:
        images(batch)
    assert error.value.field == field


def test_neutral_values_pass(make_req):
    batch = make_req()
    batch.sampling_params.cfg_gate_step = 1.0
    batch.sampling_params.max_sequence_length = 512
    batch.sampling_params.diffusers_kwargs = {}
    assert images(batch)


def test_a_field_nobody_has_thought_of_is_refused(make_req):
    batch = make_req()
    params = batch.sampling_params
    extended = dataclasses.make_dataclass(
        "Extended", [("brand_new", int, 0)], bases=(type(params),)
    )
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params) if f.init}
    batch.sampling_params = extended(**values)
    assert images(batch)
    batch.sampling_params.brand_new = 1
    with pytest.raises(RequestError, match="brand_new"):
        images(batch)


@pytest.mark.parametrize("quality", ["lossless", "high", "exact"])
def test_our_quality_is_at_least_what_is_asked(make_req, quality):
    batch = make_req()
    batch.sampling_params.quality = quality
    assert images(batch)
