"""Pictures as clients hand them over."""

import base64
import io

import httpx
from PIL import Image


def from_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def from_url(url: str) -> Image.Image:
    """What is behind a URL, which must be there."""
    response = httpx.get(url)
    response.raise_for_status()
    return Image.open(io.BytesIO(response.content))
