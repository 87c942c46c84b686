"""Requests in other words than OpenAI's: read as what they mean, or refused by their names."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from krea2_server.api.dialects import GUIDANCE_PLUS_ONE, NESTED, NO_EFFECT, SYNONYMS
from krea2_server.api.lenient import request_model
from krea2_server.api.parameters import resolve
from krea2_server.api.schemas import ImageGenerationRequest
from krea2_server.app import as_api_error
from krea2_server.errors import ApiError
from krea2_srt.messages import GenerateRequest
from krea2_srt.testing.fake_engine import MODEL

LenientRequest = request_model("common", any_fields=False)
RAW = dataclasses.replace(MODEL, distilled=False, default_steps=52, default_guidance=3.5)


def read(accept: str = "common", any_fields: bool = False, **fields) -> ImageGenerationRequest:
    """A prompt with these fields; see `read_body`."""
    return read_body({"prompt": "a fox", **fields}, accept, any_fields)


def read_body(
    body: object, accept: str = "common", any_fields: bool = False
) -> ImageGenerationRequest:
    """A body as the server reads it; raises what the client gets."""
    try:
        return request_model(accept, any_fields).model_validate(body)
    except ValidationError as error:
        # FastAPI's places begin with the body's.
        raise as_api_error([{**p, "loc": ("body", *p["loc"])} for p in error.errors()]) from None


def resolved(model=MODEL, **fields) -> tuple[GenerateRequest, list[str]]:
    request = read(**fields)
    message = resolve(request, "id", model, max_n=10, max_prompt=32_000)
    return message, request.warnings


def canonical(model=MODEL, **fields) -> GenerateRequest:
    request = ImageGenerationRequest.model_validate({"prompt": "a fox", **fields})
    return resolve(request, "id", model, max_n=10, max_prompt=32_000)


# Of each of OpenAI's or our fields: values, and how else they may be said.


def whole_numbers(names):
    return [
        *((name, lambda v: v) for name in names),
        (names[0], str),
        (names[0], float),
        (names[-1], lambda v: f" {v}.0 "),
    ]


SPELLINGS = {
    "num_inference_steps": (
        st.integers(1, 200),
        whole_numbers(
            ["num_inference_steps", *(n for n, r in SYNONYMS.items() if r[0][:7] == "num_inf")]
        ),
    ),
    "n": (
        st.integers(1, 10),
        whole_numbers(["n", *(n for n, r in SYNONYMS.items() if r[0] == "n")]),
    ),
    "seed": (
        st.integers(0, 2**53),
        [*whole_numbers(["seed", "rng_seed", "random_seed"]), ("seed", lambda v: [v])],
    ),
    "guidance_scale": (
        st.sampled_from([0.0, 1.0, 2.5, 3.5]),
        [
            *((name, lambda v: v) for name in ("guidance_scale", "guidance")),
            ("guidance_scale", str),
            *((name, lambda v: v + 1) for name in (*GUIDANCE_PLUS_ONE, "CFGScale", "cfgScale")),
            ("cfg_scale", lambda v: str(v + 1)),
        ],
    ),
    "size": (
        st.sampled_from(["512x768", "1024x1024", "1280x720"]),
        [
            ("size", lambda v: v),
            *(("size", lambda v, s=s: v.replace("x", s)) for s in ("X", "*", " x ", "×", ",", ":")),
            ("image_size", lambda v: v),
            ("imageSize", lambda v: v.replace("x", "*")),
            (
                "image_size",
                lambda v: dict(zip(("width", "height"), map(int, v.split("x")), strict=True)),
            ),
        ],
    ),
    "output_format": (
        st.sampled_from(["png", "jpeg", "webp"]),
        [
            ("output_format", lambda v: v),
            ("output_format", lambda v: v.upper().replace("JPEG", "JPG")),
            ("outputFormat", lambda v: v),
            ("format", lambda v: v),
        ],
    ),
    "negative_prompt": (
        st.sampled_from(["", " ", "rain"]),
        [(name, lambda v: v) for name in ("negative_prompt", "negativePrompt", "negative")],
    ),
    "stream": (st.booleans(), [("stream", lambda v: v), ("stream", lambda v: str(v).lower())]),
}


@st.composite
def spelled(draw):
    """A canonical body, and one that means the same."""
    plain, other = {}, {}
    for field in draw(st.lists(st.sampled_from(sorted(SPELLINGS)), unique=True)):
        values, ways = SPELLINGS[field]
        value = draw(values)
        name, write = draw(st.sampled_from(ways))
        plain[field], other[name] = value, write(value)
    for name in draw(st.lists(st.sampled_from(["style", "enhance_prompt", "user", "watermark"]))):
        other[name] = "" if name == "user" else draw(st.sampled_from([None, False, "x"]))
    if other and draw(st.booleans()):
        inner = draw(st.sampled_from(NESTED))
        name = draw(st.sampled_from(sorted(other)))
        other[inner] = {name: other.pop(name)}
    return plain, other


@given(spelled())
def test_any_mix_of_spellings_is_the_canonical_request(bodies):
    plain, other = bodies
    plain.setdefault("seed", 7)
    if not any(name in other for name in ("seed", "rng_seed", "random_seed")):
        nested = [inner for name in NESTED for inner in other.get(name, ())]
        if not {"seed", "rng_seed", "random_seed"} & set(nested):
            other["seed"] = plain["seed"]
    if not plain.get("negative_prompt", "x").strip() or not plain.get("guidance_scale", 3.5):
        plain.pop("negative_prompt", None)
    message, _ = resolved(RAW, **other)
    assert message == canonical(RAW, **plain)


WRONG = {
    "num_inference_steps": ["x", 0, 1.5, True, [3]],
    "n": ["x", 0, 11, False],
    "seed": ["x", -2, 2**63, 1.5, [1, 2]],
    "guidance_scale": ["x", -1, True],
    "size": ["x", "1x2x3", 5, [], "9:1", "0:1", {"width": 5}],
    "output_format": ["gif", "bmp", 3],
    "stream": ["x", 3],
}


@pytest.mark.parametrize("field", WRONG)
def test_what_cannot_be_read_is_refused_by_the_clients_name(field):
    other_scale = {*GUIDANCE_PLUS_ONE, "CFGScale", "cfgScale"}
    names = {name for name, _ in SPELLINGS[field][1]} - other_scale
    for name in sorted(names):
        for value in WRONG[field]:
            with pytest.raises(ApiError) as caught:
                resolved(**{name: value})
            assert caught.value.status == 400
            assert caught.value.param == name, (name, value)
            assert name in caught.value.message, (name, value)


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_what_has_no_effect_is_accepted_and_named(name):
    message, warnings = resolved(seed=1, **{name: "something"})
    assert message == canonical(seed=1)
    assert [warning.split(":")[0] for warning in warnings] == [name]
    for silent in (None, "", *NO_EFFECT[name].silent):
        assert resolved(seed=1, **{name: silent}) == (canonical(seed=1), [])


@pytest.mark.parametrize("name", sorted(SYNONYMS))
def test_each_synonym_is_its_field(name):
    values = {"size": "512x512", "output_format": "webp", "prompt": "a hen"}
    values |= {"embed_metadata": True, "lora": [{"name": "sepia", "scale": 0.5}]}
    field = SYNONYMS[name][0]
    fields = {"size": "64x64"} if field != "size" else {}
    if field in ("width", "height"):
        fields, value = {"width": 512, "height": 512}, 512
        del fields[field]
    elif field == "negative_prompt":
        fields, value = {"guidance_scale": 2.0}, "rain"
    elif field == "output_compression":
        fields, value = {"output_format": "jpeg"}, 50
    else:
        value = values.get(field, 3)
    said = "1:1" if name == "aspect_ratio" else value
    value = "1024x1024" if name == "aspect_ratio" else value
    plain = canonical(**{"seed": 3, **fields, field: value})
    if field == "prompt":
        del fields["size"]
        request = LenientRequest.model_validate({name: value, "seed": 3, "size": "64x64"})
        assert resolve(request, "id", MODEL, max_n=1, max_prompt=99) == plain
        return
    seed = {} if field == "seed" else {"seed": 3}
    assert resolved(**{**seed, **fields, name: said})[0] == plain


def test_guidance_of_another_scale_is_off_on_a_distilled_model_and_named():
    for name in GUIDANCE_PLUS_ONE:
        message, warnings = resolved(**{name: 7})
        assert message.image.guidance == 0
        assert warnings == [f"{name}: is off; this model is distilled to need no guidance"]
        assert resolved(**{name: 1})[1] == []
        assert resolved(RAW, **{name: 7})[0].image.guidance == 6
        assert resolved(RAW, **{name: 0.5})[0].image.guidance == 0


def test_guidance_in_kreas_scale_is_applied_as_sent_with_a_warning_on_a_distilled_model():
    message, (warning,) = resolved(guidance_scale=1.0)
    assert message.image.guidance == 1.0
    assert "distilled" in warning
    assert resolved(guidance_scale=0)[1] == []
    assert resolved(RAW, guidance_scale=1.0)[1] == []
    message, warnings = resolved(guidance_scale=1.0, true_cfg_scale=4.0)
    assert message.image.guidance == 1.0
    assert any(w.startswith("true_cfg_scale: has no effect") for w in warnings)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"size": "16:9"}, "1360x768"),
        ({"size": "1:1"}, "1024x1024"),
        ({"aspect_ratio": "2:3"}, "832x1248"),
        ({"aspectRatio": "9/16", "quality": "low"}, "384x672"),
        ({"aspect_ratio": "16:9", "resolution": "2K"}, "2720x1536"),
        ({"resolution": "512x512"}, "512x512"),
        ({"size": "1K"}, "1024x1024"),
        ({"image_size": "landscape_16_9"}, "1024x576"),
        ({"size": "1920x1080"}, "1920x1088"),
        ({"width": "1000", "height": 1000.0}, "1008x1008"),
        ({"size": ""}, "1024x1024"),
        ({"size": "AUTO"}, "1024x1024"),
    ],
)
def test_sizes_as_clients_write_them(fields, size):
    message, warnings = resolved(**fields)
    assert message.image.size == size
    off_grid = fields.get("size") == "1920x1080" or "width" in fields
    assert len(warnings) == off_grid
    if off_grid:
        assert size in warnings[0]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"size": "1024x1024", "aspect_ratio": "1:1"}, "1024x1024"),
        ({"aspect_ratio": "16:9", "size": "1376x768"}, "1376x768"),
        ({"size": "auto", "aspect_ratio": "3:2"}, "1248x832"),
        ({"aspect_ratio": "3:2", "size": "auto"}, "1248x832"),
        ({"width": 1376, "height": 768, "aspectRatio": "16:9"}, "1376x768"),
        ({"size": "512x512", "resolution": "2K"}, "512x512"),
        ({"size": "1:2", "aspect_ratio": "2:1"}, None),
        ({"size": "1024x512", "aspect_ratio": "1:1"}, None),
        ({"width": 512, "height": 512, "aspect_ratio": "16:9"}, None),
    ],
)
def test_a_size_that_is_said_twice_must_agree(fields, size):
    if size is None:
        with pytest.raises(ApiError) as caught:
            resolved(**fields)
        assert caught.value.param in fields
        return
    message, warnings = resolved(**fields)
    assert message.image.size == size
    assert [w.split(":")[0] for w in warnings] == (["resolution"] if "resolution" in fields else [])


def test_guidance_that_is_said_twice_must_agree():
    assert resolved(RAW, cfg=7, cfg_scale=7.0)[0].image.guidance == 6
    with pytest.raises(ApiError, match="cfg_scale: 6 is not cfg, 7"):
        read(cfg=7, cfg_scale=6)


@pytest.mark.parametrize("depth", [200, 900, 990, 10_000])
def test_bodies_nested_too_deeply_are_refused(depth):
    nested: object = []
    for _ in range(depth):
        nested = [nested]
    for fields in ({"size": nested}, {"n": nested, "parameters": {"n": [nested]}}):
        with pytest.raises(ApiError) as caught:
            read(**fields)
        assert caught.value.status == 400
    with pytest.raises(ApiError):
        read(kwargs="[" * depth + "]" * depth)


@given(st.floats(0.334, 3), st.sampled_from(["low", "medium", "high"]))
def test_a_ratio_has_about_the_pixels_of_its_quality(ratio, quality):
    message, _ = resolved(aspect_ratio=f"{ratio:.3f}:1", quality=quality)
    square, _ = resolved(quality=quality)
    image = message.image
    assert 0.85 < image.width * image.height / (square.image.width * square.image.height) <= 1
    assert abs(image.width / image.height / ratio - 1) < 0.15


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("promt_extend", "prompt_extend"), ("stpes", "steps"), ("guidence_scale", "guidance_scale")],
)
def test_a_typo_is_told_what_it_may_mean(typo, meant):
    with pytest.raises(ApiError, match=f"did you mean '{meant}'") as caught:
        read(**{typo: 1})
    assert (caught.value.param, caught.value.code) == (typo, "unknown_parameter")


def test_any_other_field_is_refused_by_name_or_named_where_any_are_allowed():
    with pytest.raises(ApiError) as caught:
        read(flux_capacitor=1)
    assert caught.value.message == "'flux_capacitor' is not known"
    for accept in ("common", "openai"):
        request = read(accept, any_fields=True, flux_capacitor=1)
        assert request.warnings == ["flux_capacitor: is not known, and was ignored"]
    many = read(any_fields=True, **{f"x{i}": 1 for i in range(1000)})
    assert len(many.warnings) < 20


@pytest.mark.parametrize("accept", ["common", "openai"])
@pytest.mark.parametrize("prompt", ["", "  ", "\u2003\n", "a\0b", "\0"])
def test_a_blank_prompt_is_refused(accept, prompt):
    with pytest.raises(ApiError) as caught:
        read(accept, prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "fields", [{"style": "vivid"}, {"steps": 3}, {"n": "2"}, {"seed": -1}, {"output_format": "jpg"}]
)
def test_by_openais_contract_all_that_is_refused(fields):
    with pytest.raises(ApiError) as caught:
        read("openai", **fields)
    assert caught.value.param in fields


@pytest.mark.parametrize("field", ["image", "mask", "controlnet", "flow_shift", "init_image"])
def test_what_would_change_the_picture_and_cannot_be_done_is_refused(field):
    with pytest.raises(ApiError) as caught:
        read(**{field: "something"})
    assert caught.value.param == field


@pytest.mark.parametrize("accept", ["common", "openai"])
def test_requests_share_nothing(accept):
    first, second = (request_model(accept, False)(prompt="x") for _ in range(2))
    first.warnings.append("of the first")
    assert second.warnings == []
    # Pydantic would read a factory's signature for each request, which costs as much as all fields.
    private = type(first).__private_attributes__.values()
    assert private
    assert all(attribute.default_factory is None for attribute in private)


def test_two_fields_that_say_different_things_are_refused():
    with pytest.raises(ApiError, match="num_inference_steps: 4 is not steps, 3"):
        read(steps=3, num_inference_steps=4)
    assert read(steps=3, num_inference_steps="3.0").num_inference_steps == 3
    with pytest.raises(ApiError, match=r"parameters\.n: 2 is not n, 3"):
        read(n=3, parameters={"n": 2})


def test_bodies_of_dashscope_and_xinference_are_read():
    content = [{"role": "user", "content": [{"text": "a hen"}]}]
    body = {
        "model": "qwen-image",
        "input": {"messages": content},
        "parameters": {"size": "512*512", "n": 1, "prompt_extend": True, "watermark": False},
    }
    request = LenientRequest.model_validate(body)
    assert (request.prompt, request.size) == ("a hen", "512x512")
    assert [warning.split(":")[0] for warning in request.warnings] == ["prompt_extend"]
    request = read(kwargs='{"num_inference_steps": 4}', size="256*256")
    assert request.num_inference_steps == 4
    for wrong in ("{", "[]", "3"):
        with pytest.raises(ApiError) as caught:
            read(kwargs=wrong)
        assert caught.value.param == "kwargs"


@given(
    st.dictionaries(
        st.text(max_size=20),
        st.recursive(
            st.none() | st.text() | st.integers() | st.floats() | st.booleans(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.text(max_size=9) | st.sampled_from(["messages", "size", "n"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=6,
        ),
    ),
    st.sampled_from(
        [*NESTED, *SYNONYMS, *NO_EFFECT, *GUIDANCE_PLUS_ONE, *LenientRequest.model_fields]
    ),
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "size", "n", "width", "height"]), inner, max_size=3
            )
        ),
        max_leaves=6,
    ),
)
def test_whatever_is_sent_is_read_or_refused(body, name, value):
    try:
        resolved(
            **{
                k: v
                for k, v in {**body, name: value}.items()
                if k not in ("model", "accept", "any_fields")
            }
        )
    except ApiError as error:
        if error.status != 400:
            raise
