"""The VAE, narrow: trained on scenes until it draws them again.

Diffusers' module, in which every causal 3-D convolution is run as the 2-D one that it is for a
single frame; see `krea2_srt.model.vae`.
"""

import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krea2_srt.demo.checkpoint import VAE_CONFIG
from tools.demo_model.muon import Muon
from tools.demo_model.precision import fast
from tools.demo_model.wish import draw_wish

_SIDE = 96
"""Side of the pictures that are trained on, in pixels: convolutions do not mind, and one is
compiled.
"""

_COUNT = 12
"""Pictures in a batch."""

_LOOK_EVERY = 200
_LR = 2e-3
_MUON_LR = 0.02
_NOISE = 0.3
"""Most noise of latents, as part of their deviation: the decoder must bear what the DiT gets wrong.
"""

_LITTLE_NOISE = 0.15
"""The same, for the decoder alone."""

_POOL = 200
"""Batches of different scenes."""

_SHRUNK = 12
"""So many latents are the picture itself, four times smaller; the others are the encoder's choice.

What the DiT has to draw is then mostly a small picture, in which a wrong value is a wrong colour
and nothing worse.
"""


Say = Callable[[str], None]


def new_autoencoder() -> nn.Module:
    """With random weights, and nothing in the temporal slices that one frame never meets.

    Each convolution keeps the deviation of what it is given, and residual blocks begin as what they
    are given: with torch's own weights, which shrink a signal at every layer, the first minutes go
    by without learning.
    """
    from diffusers import AutoencoderKLQwenImage
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    vae: nn.Module = AutoencoderKLQwenImage(**VAE_CONFIG)
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        with torch.no_grad():
            if module.bias is not None:
                module.bias.zero_()
            kernel = module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight
            fan_in = kernel[0].numel()
            branch = name.endswith(("conv2", "proj"))
            random = torch.randn(kernel.shape) * (0.1 if branch else 1.0) * fan_in**-0.5
            module.weight.zero_()
            kernel.copy_(random)
        if isinstance(module, QwenImageCausalConv3d):
            # All that one frame meets.
            module.weight = nn.Parameter(module.weight[:, :, -1:].detach().clone())
            module.forward = partial(_one_frame, module)
    return vae


def _one_frame(conv: nn.Conv3d, x: Tensor, cache_x: None = None) -> Tensor:
    weight = conv.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    x = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, conv.bias, padding=weight.shape[-1] // 2)[:, :, None]


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents [n, 16, h, w] (their means) of pixels [n, 3, 8 h, 8 w] in ±1."""
    moments: Tensor = vae.quant_conv(vae.encoder(pixels[:, :, None]))
    return moments[:, : moments.shape[1] // 2, 0]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents; the inverse of `encode`."""
    return vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


class Codec:
    """Pixels to what the DiT draws and back: latents of mean 0 and deviation 1.

    Args:
        vae: trained.
        mean, std: of its latents, by channel; see `statistics`.
    """

    def __init__(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        self._vae = vae
        self._mean, self._std = mean[:, None, None], std[:, None, None]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return (encode(self._vae, pixels) - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return decode(self._vae, latents * self._std + self._mean)


def shrunk(pixels: Tensor) -> Tensor:
    """What the first `_SHRUNK` latents are to be: means of 4 x 4 pixels, [n, 12, h, w]."""
    return F.pixel_unshuffle(F.avg_pool2d(pixels, 4), 2)


def scenes(random: Random, width: int, height: int, count: int) -> Tensor:
    """Pixels of some scenes: [count, 3, height, width] in ±1."""
    drawn: list[np.ndarray] = []
    while len(drawn) < count:
        wish = draw_wish(random)
        if wish.fits(width, height):
            drawn.append(wish.grant(width, height, random).draw())
    return to_tensor(np.stack(drawn))


def to_tensor(pictures: np.ndarray) -> Tensor:
    """[n, height, width, 3] bytes to [n, 3, height, width] in ±1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`."""
    scaled = (pixels.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def psnr(vae: Any, random: Random, count: int = 64, side: int = 128) -> float:
    """Decibels, mean over new scenes, of what comes back against what went in."""
    pixels = scenes(random, side, side, count)
    with torch.no_grad():
        back = decode(vae, encode(vae, pixels)).clamp(-1, 1)
    error = ((back - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def train(vae: Any, seed: int, target_db: float, limit_s: float, compiled: bool, say: Say) -> float:
    """Train both halves until scenes come back as well as asked for.

    Args:
        vae: new.
        seed: of everything.
        target_db: PSNR of new scenes.
        limit_s: at most.
        compiled: a minute at first, then three times as fast.
        say: is told how it goes.

    Returns:
        The PSNR.

    Raises:
        TimeoutError: not within the time.
    """

    def there_and_back(pixels: Tensor, shaken: Tensor) -> tuple[Tensor, Tensor]:
        latents = encode(vae, pixels)
        return latents, decode(vae, _noisy(latents, shaken))

    random, run = Random(seed), _fast(there_and_back, compiled)

    def loss() -> Tensor:
        pixels = scenes(random, _SIDE, _SIDE, _COUNT)
        latents, back = run(pixels, _noise(_COUNT, _SIDE, _NOISE))
        wrong = F.l1_loss(back, pixels) + F.mse_loss(back, pixels)
        return wrong + F.mse_loss(latents[:, :_SHRUNK], shrunk(pixels))

    return _descend(vae, loss, lambda: psnr(vae, Random(seed + 1)), target_db, limit_s, say)


def sharpen(
    vae: Any, seed: int, target_db: float, limit_s: float, compiled: bool, say: Say
) -> float:
    """Train the decoder alone, also on edges; see `train`.

    Latents stay as they are, so what draws them may be trained meanwhile.
    """
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    random = Random(seed)
    pool = []
    for _ in range(_POOL):
        pixels = scenes(random, _SIDE, _SIDE, _COUNT)
        with torch.no_grad():
            pool.append((pixels, encode(vae, pixels)))
    run = _fast(lambda latents, shaken: decode(vae, _noisy(latents, shaken)), compiled)

    def loss() -> Tensor:
        pixels, latents = random.choice(pool)
        wrong = run(latents, _noise(_COUNT, _SIDE, _LITTLE_NOISE)) - pixels
        edges = sum(wrong.diff(dim=axis).abs().mean() for axis in (2, 3))
        return wrong.abs().mean() + wrong.square().mean() + edges

    return _descend(decoder, loss, lambda: psnr(vae, Random(seed + 1)), target_db, limit_s, say)


def _fast(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """In bfloat16 where the CPU multiplies that faster, its results in float32 again."""
    if compiled:
        function = torch.compile(function, dynamic=False)

    def run(*given: Tensor) -> Any:
        with fast():
            made = function(*given)
        return tuple(it.float() for it in made) if isinstance(made, tuple) else made.float()

    return run


def _noise(count: int, side: int, most: float) -> Tensor:
    """Noise of latents, in their deviations: up to so much, more on some pictures."""
    amount = most * torch.rand(count, 1, 1, 1)
    return amount * torch.randn(count, VAE_CONFIG["z_dim"], side // 8, side // 8)


def _noisy(latents: Tensor, shaken: Tensor) -> Tensor:
    return latents + shaken * latents.detach().std(dim=(0, 2, 3), keepdim=True)


def _descend(
    module: nn.Module,
    loss: Callable[[], Tensor],
    measure: Callable[[], float],
    target_db: float,
    limit_s: float,
    say: Say,
) -> float:
    """Train what a single frame meets of a module; see `train`."""
    used = [it for name, it in module.named_parameters() if "time_conv" not in name]
    others = [it for it in used if it.ndim <= 3]
    optimizers = (
        (_MUON_LR, Muon([it for it in used if it.ndim > 3], lr=_MUON_LR)),
        (_LR, torch.optim.AdamW(others, lr=_LR, betas=(0.9, 0.95), weight_decay=0.0)),
    )
    start, step = time.monotonic(), 0
    while True:
        elapsed = time.monotonic() - start
        share = min(elapsed / limit_s, 1.0)
        now = loss()
        now.backward()
        nn.utils.clip_grad_norm_(used, 1.0)
        for lr, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * max(0.01, 1.0 - share)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % _LOOK_EVERY and share < 1:
            continue
        found = measure()
        say(f"VAE: step {step}, {elapsed:.0f} s, loss {now.item():.4f}, {found:.2f} dB")
        if found >= target_db:
            return found
        if share == 1:
            raise TimeoutError(f"the VAE is at {found:.1f} dB after {limit_s:.0f} s")


def statistics(vae: Any, random: Random) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel."""
    with torch.no_grad():
        found = [encode(vae, scenes(random, side, side, 64)) for side in (64, 96, 128)]
    values = torch.cat([latents.transpose(0, 1).flatten(1) for latents in found], dim=1)
    return values.mean(dim=1), values.std(dim=1)
