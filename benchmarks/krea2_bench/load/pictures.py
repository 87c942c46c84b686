"""Whether an answer is the picture that was asked for."""

import io

import numpy as np
from PIL import Image


class PictureError(Exception):
    """Bytes are not the picture that was asked for; the message says why."""


def load_decoders() -> None:
    """Load what decodes pictures, and use it once."""
    for name in ("png", "jpeg", "webp"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, name)
        decoded(file.getvalue(), 16, 16)


def decoded(data: bytes, width: int, height: int) -> np.ndarray:
    """The pixels of an encoded picture, uint8 [height, width, 3].

    Raises:
        PictureError: it cannot be decoded to its last byte, or has another size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        raise PictureError(f"broken image: {error}") from None
    if pixels.shape != (height, width, 3):
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise PictureError(f"image of {got} in place of {width}x{height}")
    return pixels
