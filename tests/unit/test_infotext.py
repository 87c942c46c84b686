"""A request in its image's file: whatever its prompts hold, it is read as it was sent."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from krea2_srt import __version__
from krea2_srt.images import FORMATS, encode_image, holds_infotext
from krea2_srt.infotext import infotext
from krea2_srt.request import AdapterUse, ImageRequest
from tests.infotexts import settings_in, text_in

IMAGE = ImageRequest("a fox", 64, 48, 8, seed=7)
PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)

prompts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
lines = st.lists(
    st.sampled_from(["", " ", "a fox", "Negative prompt: x", "Steps: 9, Seed: 1, Size: 1x1", '"'])
    | prompts,
    min_size=1,
    max_size=4,
).map("\n".join)


def test_the_text_is_what_a1111_writes():
    raw = dataclasses.replace(IMAGE, guidance=3.5, negative_prompt="blur, text")
    assert infotext(raw, "krea-2-raw") == (
        "a fox\n"
        "Negative prompt: blur, text\n"
        "Steps: 8, Sampler: Euler, CFG scale: 4.5, Seed: 7, Size: 64x48, Model: krea-2-raw, "
        f"Guidance scale: 3.5, Version: krea2-srt {__version__}"
    )
    assert "CFG scale: 1, " in infotext(IMAGE, "krea-2-turbo")


def test_nothing_that_changes_a_picture_is_left_out():
    """A field that `ImageRequest` gets belongs into the text too."""
    adapters = frozenset({AdapterUse("sepia", "0123456789abcdef", 0.8)})
    other = ImageRequest("a hen", 80, 64, 9, 0.5, "blur", 8, 2, 1.15, adapters)
    for field in dataclasses.fields(ImageRequest):
        changed = dataclasses.replace(IMAGE, **{field.name: getattr(other, field.name)})
        assert changed != IMAGE
        is_told = infotext(changed, "krea-2") != infotext(IMAGE, "krea-2")
        # The text is of one image, whatever came with it.
        assert is_told == (field.name != "num_images"), field.name


def test_adapters_are_told_by_name_hash_and_scale():
    uses = {AdapterUse("sepia", "0123456789abcdef", 0.8), AdapterUse("ink, v2", "f" * 64)}
    told = infotext(dataclasses.replace(IMAGE, adapters=frozenset(uses)), "krea-2")
    said = settings_in(told)
    assert said["Lora hashes"] == "ink, v2: ffffffffffff, sepia: 0123456789ab"
    assert said["Lora scales"] == "ink, v2: 1.0, sepia: 0.8"


@given(lines.filter(str.strip), lines, st.floats(0.0, 100.0), prompts.filter(str.strip))
@example("a\nNegative prompt: b", "", 0.0, "krea-2")
@example(" a\n\n b ", "Negative prompt:", 0.1, 'my "model", v2: new')
@example("\n", "\n", 1.0, "x")
def test_what_is_read_is_what_was_sent(prompt, negative, guidance, model):
    sent = dataclasses.replace(IMAGE, prompt=prompt, negative_prompt=negative, guidance=guidance)
    said = settings_in(infotext(sent, model))
    assert (said["Prompt"], said["Negative prompt"]) == (prompt, negative)
    assert float(said["Guidance scale"]) == guidance
    assert (said["Steps"], said["Seed"], said["Size"]) == ("8", "7", "64x48")


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("text", ["a fox", "ein Füchslein", "狐 🦊\nzwei", "x" * 32_000])
def test_a_file_holds_it_and_has_the_same_pixels(output_format, text):
    plain = encode_image(PIXELS, output_format, 90)
    told = encode_image(PIXELS, output_format, 90, text)
    assert (text_in(plain), text_in(told)) == (None, text)
    assert raster(told) == raster(plain)
    assert encode_image(PIXELS, output_format, 90, "") == plain


def test_png_has_latin_1_as_plain_text_and_the_rest_as_utf_8():
    assert b"tEXtparameters\0a f\xfcchs" in encode_image(PIXELS, "png", infotext="a füchs")
    assert "狐".encode() in encode_image(PIXELS, "png", infotext="狐")


def test_a_jpeg_says_what_it_has_no_room_for():
    longest = (65_533 - 44 - 14) // 2
    while holds_infotext("jpeg", "x" * longest):
        longest += 1
    assert text_in(encode_image(PIXELS, "jpeg", infotext="x" * (longest - 1))) is not None
    with pytest.raises(ValueError, match="EXIF"):
        encode_image(PIXELS, "jpeg", infotext="x" * longest)
    assert holds_infotext("png", "x" * 100_000)
    assert holds_infotext("webp", "x" * 100_000)


def raster(file: bytes) -> bytes:
    with Image.open(io.BytesIO(file)) as image:
        return image.tobytes()
