import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.errors import RequestError
from krea2_srt.request import MAX_SEED, ImageRequest, RequestLimits, fit_size, round_up_size

GOOD = {"prompt": "x", "width": 1024, "height": 512, "steps": 8}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", None),
        ("prompt", "\ud800"),
        ("negative_prompt", None),
        ("width", 0),
        ("width", -16),
        ("width", 255),
        ("width", 100000),
        ("width", 512.0),
        ("width", True),
        ("height", 8),
        ("steps", 0),
        ("steps", 10**8),
        ("steps", None),
        ("seed", -1),
        ("seed", 2**64),
        ("num_images", 0),
        ("num_images", 999),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("guidance", -0.1),
        ("guidance", "4"),
        ("mu", math.nan),
        ("mu", 1e9),
    ],
)
def test_a_bad_value_names_its_field(field, value):
    with pytest.raises(RequestError) as error:
        ImageRequest(**{**GOOD, field: value}).check(RequestLimits())
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


def test_too_many_pixels_name_both_numbers():
    request = ImageRequest(prompt="x", width=4096, height=2048, steps=8)
    with pytest.raises(RequestError, match=r"4096x2048 has 8388608 pixels, the limit is 4194304"):
        request.check(RequestLimits())


@pytest.mark.parametrize("size", [(16, 16), (2048, 2048), (4096, 1024)])
def test_sizes_up_to_the_limit_pass(size):
    ImageRequest(prompt="", width=size[0], height=size[1], steps=1).check(RequestLimits())


@given(st.integers(1, 10000))
def test_sizes_round_up_to_the_next_multiple_of_16(pixels):
    rounded = round_up_size(pixels)
    assert rounded % 16 == 0
    assert 0 <= rounded - pixels < 16


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((1000, 1000), (1008, 1008)),
        ((1920, 1080), (1920, 1088)),
        ((1, 1), (16, 16)),
        ((2040, 2050), (2032, 2048)),  # 2048x2064 has too many pixels
        ((4100, 300), (4096, 288)),
        ((5000, 5000), (2048, 2048)),
        ((1024, 768), (1024, 768)),
        ((4096, 4096), (4096, 4096)),  # on the grid: as asked, and refused
        ((0, 8), (0, 8)),
        ((10**400, 8), (10**400, 8)),
    ],
)
def test_a_size_off_the_grid_goes_up_and_then_into_the_limits(asked, made):
    assert fit_size(*asked, RequestLimits()) == made


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_no_size_off_the_grid_is_refused(width, height):
    limits = RequestLimits()
    fitted = fit_size(width, height, limits)
    if fitted != (width, height):
        made = ImageRequest("x", *fitted, steps=1)
        made.check(limits)
        assert fit_size(*fitted, limits) == fitted


def test_seeds_count_up():
    assert ImageRequest(**GOOD, seed=7, num_images=3).seeds == [7, 8, 9]


def test_seeds_begin_anew_behind_the_largest_and_each_can_be_asked_for():
    request = ImageRequest(**GOOD, seed=MAX_SEED - 1, num_images=4)
    assert request.seeds == [MAX_SEED - 1, MAX_SEED, 0, 1]
    for single in request.singles():
        single.check(RequestLimits())


def test_the_engine_imports_no_torch():
    code = "import sys, krea2_srt.request; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
