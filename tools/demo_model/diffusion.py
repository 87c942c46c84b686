"""The DiT: flow matching on latents, at the noise levels that Turbo's eight steps will ask for."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from krea2_srt.model.checkpoint import config_dict
from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.schedule import TURBO_MU, flow_schedule
from tools.demo_model.dataset import Batch, pad

STEPS = 8
"""Of Turbo."""

_ON_SCHEDULE = 0.5
"""Part of the noise levels that are Turbo's; the others are anywhere, for other schedules."""

_NO_PROMPT = 0.08
"""Part of the examples without a caption, so that guidance has something to guide away from."""

_EMA = 0.998


def new_dit(config: Krea2Config) -> nn.Module:
    """With random weights: Diffusers' module, which keeps what gradients need."""
    from diffusers import Krea2Transformer2DModel

    dit: nn.Module = Krea2Transformer2DModel(**config_dict(config))
    for name, parameter in dit.named_parameters():
        with torch.no_grad():
            if name == "final_layer.linear.weight":
                parameter.zero_()
            elif name.endswith("scale_shift_table"):
                parameter.zero_()
                if parameter.shape[0] == 6:
                    parameter[[2, 5]] = 0.3  # gates: open a bit
            elif name.startswith("time_mod_proj"):
                parameter.zero_()
    return dit


def position_ids(text_tokens: int, rows: int, columns: int) -> Tensor:
    """Rotary coordinates: text at the origin, image tokens on their grid."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    image = torch.cat([torch.zeros(rows * columns, 1), grid.reshape(-1, 2)], dim=1)
    return torch.cat([torch.zeros(text_tokens, 3), image])


def velocity(dit: nn.Module, batch: Batch, noisy: Tensor, sigmas: Tensor) -> Tensor:
    """What the DiT says: float32 [n, image tokens, 64].

    In bfloat16, in which it will be served, and which a CPU multiplies faster.
    """
    ids = position_ids(batch.features.shape[1], batch.rows, batch.columns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found: Tensor = dit(noisy, batch.features, sigmas, ids, batch.mask, return_dict=False)[0]
    return found.float()


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels, spread evenly so that no batch has only high ones."""
    schedule = torch.tensor(flow_schedule(STEPS, TURBO_MU).timesteps)
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    shift = math.exp(0.5 * TURBO_MU)
    anywhere = shift * even / (1 + (shift - 1) * even)
    listed = schedule[(even * STEPS).long().clamp(max=STEPS - 1)]
    chosen = torch.rand(count, generator=generator) < _ON_SCHEDULE
    return torch.where(chosen, listed, anywhere)


def loss_of(dit: nn.Module, batch: Batch, generator: torch.Generator, no_prompt: Tensor) -> Tensor:
    """Mean squared error of the velocity."""
    count = len(batch.tokens)
    sigmas = draw_sigmas(count, generator)[torch.randperm(count, generator=generator)]
    noise = torch.randn(batch.tokens.shape, generator=generator)
    level = sigmas[:, None, None]
    noisy = (1 - level) * batch.tokens + level * noise
    dropped = torch.rand(count, generator=generator) < _NO_PROMPT
    features = batch.features.clone()
    mask = batch.mask.clone()
    features[dropped] = 0
    mask[dropped] = False
    features[dropped, : len(no_prompt)] = no_prompt
    mask[dropped, : len(no_prompt)] = True
    batch = Batch(features, mask, batch.tokens, batch.rows, batch.columns)
    return (velocity(dit, batch, noisy, sigmas) - (noise - batch.tokens)).square().mean()


@dataclass
class Trainer:
    """The weights, their moving average, and the optimisers.

    Attributes:
        dit: being trained.
        average: of its weights; what is shipped.
    """

    dit: nn.Module
    lr: float = 2e-3

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.dit).requires_grad_(False)
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.dit.named_parameters():
            hidden = "blocks." in name and parameter.ndim == 2 and "table" not in name
            (matrices if hidden else others).append(parameter)
        self._optimizers = [
            torch.optim.Muon(matrices, lr=10 * self.lr, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.steps = 0

    def step(self, loss: Tensor, scale: float) -> None:
        """One step down.

        Args:
            loss: to make smaller.
            scale: of the learning rates.
        """
        loss.backward()
        nn.utils.clip_grad_norm_(self.dit.parameters(), 1.0)
        warm = min(1.0, (self.steps + 1) / 100)
        for optimizer, lr in zip(self._optimizers, (10 * self.lr, self.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale * warm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(_EMA, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.dit.parameters()), 1 - keep
            )


@torch.no_grad()
def draw(
    dit: nn.Module,
    features: Sequence[Tensor],
    rows: int,
    columns: int,
    seed: int,
    steps: int = STEPS,
) -> Tensor:
    """Latents of prompts, as Turbo draws them: [n, image tokens, 64]."""
    padded, mask = pad(features)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(features), rows * columns, 64, generator=generator)
    sigmas = flow_schedule(steps, TURBO_MU).sigmas
    for now, then in pairwise(sigmas):
        batch = Batch(padded, mask, x, rows, columns)
        x = x + (then - now) * velocity(dit, batch, x, torch.full((len(x),), now))
    return x
