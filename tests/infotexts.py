"""Settings in images' files, read as A1111 and the viewers of its files read them."""

import io
import json
import re

from PIL import Image

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


def text_in(file: bytes) -> str | None:
    """The text in an image's file; None where there is none."""
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        if (text := image.info.get("parameters")) is not None:
            return str(text)
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if comment is None:
        return None
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def settings_in(text: str) -> dict[str, str]:
    """What a text says, by names; prompts are there as ``Prompt`` and ``Negative prompt``."""
    *lines, last = text.strip().split("\n")
    assert len(_SETTING.findall(last)) >= 3, "else the last line is the prompt's"
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    part = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            part, line = "Negative prompt", line.removeprefix(_NEGATIVE).strip()
        # Empty lines at the beginning go.
        if line or prompts[part]:
            prompts[part].append(line)
    found = {name: "\n".join(those) for name, those in prompts.items()}
    for name, value in _SETTING.findall(last):
        is_quoted = value[:1] == value[-1:] == '"'
        found[name] = json.loads(value) if is_quoted else value.strip()
    return found


def request_in(file: bytes) -> dict[str, object]:
    """Fields of a request that generates an image again."""
    text = text_in(file)
    assert text is not None
    said = settings_in(text)
    fields: dict[str, object] = {
        "prompt": said["Prompt"],
        "size": said["Size"],
        "seed": int(said["Seed"]),
        "num_inference_steps": int(said["Steps"]),
        "guidance_scale": float(said["Guidance scale"]),
    }
    if said["Negative prompt"]:
        fields["negative_prompt"] = said["Negative prompt"]
    return fields
