"""Colourful pictures for the stand-in: a sun over hills, another one for each seed."""

import base64
import io
from functools import cache

import numpy as np
from PIL import Image

LARGEST_PREVIEW = 256
"""Pixels of a preview's longer side."""

Pixels = np.ndarray

# Sky, haze, ground and sun, as RGB.
PALETTES = np.array(
    [
        [[38, 70, 120], [244, 190, 150], [28, 36, 66], [255, 236, 190]],
        [[255, 176, 124], [255, 226, 190], [92, 44, 72], [255, 250, 224]],
        [[110, 182, 206], [226, 240, 226], [22, 84, 80], [255, 246, 196]],
        [[24, 26, 62], [96, 84, 150], [14, 14, 34], [240, 232, 214]],
        [[226, 92, 86], [250, 188, 118], [64, 20, 54], [255, 226, 150]],
        [[150, 204, 176], [246, 238, 204], [46, 72, 48], [250, 158, 96]],
    ],
    np.float32,
)


@cache
def draw_scene(width: int, height: int, seed: int) -> Pixels:
    """uint8 [height, width, 3], not to be written to."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    sky, haze, ground, sun = PALETTES[seed % len(PALETTES)]
    canvas = sky + (haze - sky) * np.minimum(y * 1.6, 1)[..., None]
    distance = np.hypot((x - random.uniform(0.2, 0.8)) * width / height, y - 0.35)
    glow = np.clip(1 - distance / 0.45, 0, 1)[..., None] ** 2
    canvas = canvas + (sun - canvas) * np.maximum(glow, (distance < 0.11)[..., None])
    for ridge in range(5):
        waves = sum(
            np.sin(x * random.uniform(2, 9) * scale + random.uniform(0, 6.3)) / scale
            for scale in (1, 2, 4)
        )
        below = y > 0.45 + 0.11 * ridge + 0.06 * waves
        canvas[below] = haze + (ground - haze) * ((ridge + 1) / 5)
    return canvas.astype(np.uint8)


def add_noise(pixels: Pixels, amount: float, seed: int) -> Pixels:
    """A preview of an unfinished picture, smaller; ``amount`` 1 is noise alone."""
    height, width = pixels.shape[:2]
    shrink = max(1, max(width, height) // LARGEST_PREVIEW)
    small = pixels[::shrink, ::shrink]
    noise = np.random.default_rng(seed).uniform(0, 255, small.shape)
    return (small * (1 - amount) + noise * amount).astype(np.uint8)


def to_base64(pixels: Pixels, image_format: str) -> str:
    """The file, png, jpeg or webp."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format.upper(), compress_level=1)
    return base64.b64encode(file.getvalue()).decode()
