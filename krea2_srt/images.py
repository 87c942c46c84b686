"""Pictures as files."""

import io
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS = ("png", "jpeg", "webp")

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_PNG_LEVEL = 1
"""zlib's: on pictures level 6 takes three times as long for a few per cent."""

_PNG_KEYWORD = "parameters"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286

_MAX_JPEG_EXIF = 65_533
"""Bytes: a segment of JPEG counts its own in 16 bits."""


def encode_image(
    pixels: np.ndarray[Any, Any], output_format: str, quality: int = 100, infotext: str = ""
) -> bytes:
    """A file's content.

    Args:
        pixels: uint8 [height, width, 3].
        output_format: of `FORMATS`.
        quality: of JPEG and WebP, 0 to 100; PNG keeps every pixel.
        infotext: put into the file where A1111 has it: a text of PNG, or EXIF's user comment.

    Raises:
        ValueError: an unknown format, or one that cannot hold the text.
    """
    if output_format not in FORMATS:
        raise ValueError(f"output_format: must be one of {', '.join(FORMATS)}")
    options: dict[str, Any] = (
        {"compress_level": _PNG_LEVEL} if output_format == "png" else {"quality": quality}
    )
    if infotext and output_format == "png":
        options["pnginfo"] = PngInfo()
        # tEXt where Latin-1 has all of it, else iTXt.
        options["pnginfo"].add_text(_PNG_KEYWORD, infotext)
    elif infotext:
        options["exif"] = _exif(infotext)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=output_format.upper(), **options)
    return file.getvalue()


def holds_infotext(output_format: str, infotext: str) -> bool:
    """Whether a file of this format has room for a text."""
    return output_format != "jpeg" or len(_exif(infotext)) <= _MAX_JPEG_EXIF


def _exif(infotext: str) -> bytes:
    """EXIF with nothing but a user comment."""
    exif = Image.Exif()
    # Big-endian, as Pillow writes all of it and as A1111 reads the comment.
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + infotext.encode("utf-16-be")
    return exif.tobytes()
