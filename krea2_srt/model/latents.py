"""Noise, and the two layouts of latents: a grid of channels and a list of patch tokens."""

import torch
from torch import Tensor

LATENT_CHANNELS = 16
VAE_SCALE = 8
PATCH = 2
SIZE_MULTIPLE = VAE_SCALE * PATCH
"""Widths and heights in pixels are multiples of this; one image token covers its square."""


def initial_noise(
    width: int, height: int, seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Starting noise of one image.

    Sampled on the device and in the compute dtype from the image's own generator, as the released
    samplers do: a seed gives other noise in another dtype or on another kind of device.

    Args:
        width, height: in pixels, multiples of 16.
        seed: of this image.
        device: where to sample.
        dtype: in which to sample.

    Returns:
        [16, height / 8, width / 8].
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, LATENT_CHANNELS, height // VAE_SCALE, width // VAE_SCALE)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)[0]


def patchify(latents: Tensor) -> Tensor:
    """[c, 2 * rows, 2 * columns] -> [rows * columns, 4 * c], patch order (c ph pw)."""
    channels, height, width = latents.shape
    grid = latents.view(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * PATCH * PATCH)


def unpatchify(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, 4 * c] -> [c, 2 * rows, 2 * columns]; the inverse of `patchify`."""
    channels = tokens.shape[-1] // (PATCH * PATCH)
    grid = tokens.view(rows, columns, channels, PATCH, PATCH)
    return grid.permute(2, 0, 3, 1, 4).reshape(channels, rows * PATCH, columns * PATCH)
