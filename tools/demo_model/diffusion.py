"""The DiT: flow matching on latents, at the noise levels that Turbo's eight steps will ask for."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from krea2_srt.demo.random_weights import time_shares
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import config_dict
from krea2_srt.model.schedule import TURBO_MU, flow_schedule
from tools.demo_model.dataset import Batch, pad
from tools.demo_model.guide import Guided, wrong
from tools.demo_model.muon import Muon
from tools.demo_model.precision import fast

STEPS = 8
"""Steps of Turbo."""

_ON_SCHEDULE = 0.5
"""Part of the noise levels that are Turbo's; the others are anywhere, for other schedules."""

_NO_PROMPT = 0.08
"""Part of the examples without a caption, so that guidance has something to guide away from."""

_EMA = 0.998

_TIME_ERROR = 2.0**-9
"""Largest error of a noise level as the DiT gets it: some engines round it to bfloat16."""


def new_dit(config: Krea2Config) -> nn.Module:
    """With random weights: Diffusers' module, which keeps what gradients need.

    It begins with what it is given, x, for an answer: with as many channels of noise to hand on as
    a patch has, learning that alone would take a good part of the time.
    """
    from diffusers import Krea2Transformer2DModel

    dit: Any = Krea2Transformer2DModel(**config_dict(config))
    with torch.no_grad():
        dit.text_fusion.projector.weight.fill_(1 / config.num_text_layers)
        for block in dit.transformer_blocks:
            block.scale_shift_table[[2, 5]] = 0.3  # gates: open a bit
        for module in (dit.time_mod_proj, dit.final_layer.linear, dit.img_in):
            module.weight.zero_()
            module.bias.zero_()
        hidden, channels = dit.img_in.weight.shape
        basis = torch.linalg.qr(torch.randn(hidden, channels + 1)).Q
        given, common = basis[:, :channels], basis[:, channels]
        dit.img_in.weight.copy_(given * (hidden / channels) ** 0.5)
        # What image tokens have in common, so that their queries are not of noise alone: by the
        # text's keys, which are at the origin, they can then tell where they are.
        dit.img_in.bias.copy_(common * hidden**0.5)
        dit.final_layer.linear.weight.copy_(given.T * (channels / hidden) ** 0.5)
        dit.time_embed.linear_1.weight *= time_shares(config.timestep_embed_dim)
    return dit


class _Fused(nn.Module):
    """In the place of the text fusion, for features that have been through it."""

    def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
        return features


def position_ids(text_tokens: int, rows: int, columns: int) -> Tensor:
    """Rotary coordinates: text at the origin, image tokens on their grid."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    image = torch.cat([torch.zeros(rows * columns, 1), grid.reshape(-1, 2)], dim=1)
    return torch.cat([torch.zeros(text_tokens, 3), image])


def velocity(dit: nn.Module, batch: Batch, noisy: Tensor, sigmas: Tensor) -> Tensor:
    """What the DiT says: float32 [n, image tokens, 64].

    In bfloat16, in which it will be served, where the CPU multiplies that faster than float32.
    """
    with fast():
        found: Tensor = dit(noisy, *_asked(batch, sigmas), return_dict=False)[0]
    return found.float()


def _asked(batch: Batch, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a DiT is given with the latents."""
    ids = position_ids(batch.features.shape[1], batch.rows, batch.columns)
    return batch.features, sigmas, ids, batch.mask


def draw_sigmas(count: int, generator: torch.Generator, first: int = STEPS) -> Tensor:
    """Noise levels, spread evenly so that no batch has only high ones.

    Args:
        count: of them.
        generator: of the chance.
        first: so many of Turbo's steps are drawn from. Fewer teach what a prompt asks for sooner:
            where there is little noise the picture itself says it.
    """
    schedule = torch.tensor(flow_schedule(STEPS, TURBO_MU).timesteps)
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    shift = math.exp(0.5 * TURBO_MU)
    anywhere = shift * even / (1 + (shift - 1) * even)
    listed = schedule[(even * first).long().clamp(max=first - 1)]
    part = _ON_SCHEDULE if first == STEPS else 1 - (1 - _ON_SCHEDULE) / 2
    chosen = torch.rand(count, generator=generator) < part
    return torch.where(chosen, listed, anywhere)


def loss_of(
    guided: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    no_prompt: Tensor,
    first: int = STEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """How wrong a DiT is.

    Args:
        guided: the DiT in training.
        batch: of pictures and their prompts.
        generator: of the noise.
        no_prompt: features of the empty prompt.
        first: see `draw_sigmas`.

    Returns:
        Mean squared error of the velocity, and what `guide.wrong` finds.
    """
    count = len(batch.tokens)
    assert batch.answers is not None
    sigmas = draw_sigmas(count, generator, first)[torch.randperm(count, generator=generator)]
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
    shown = replace(batch, features=features, mask=mask)
    told = sigmas * (1 + _TIME_ERROR * (2 * torch.rand(count, generator=generator) - 1))
    with fast():
        found, said = guided(noisy, *_asked(shown, told))
    error = (found.float() - (noise - batch.tokens)).square().mean()
    return error, *wrong(said, batch.answers)


class Trainer:
    """The weights, their moving average, and the optimisers.

    Args:
        dit: to train; its text fusion is not.
        lr: of AdamW; Muon's is ten times that.

    Attributes:
        guided: being trained.
        average: of its weights.
        steps: so far.

    The DiTs take captions that are fused already.
    """

    def __init__(self, dit: Any, lr: float = 2e-3) -> None:
        self._lr, self._fusion = lr, dit.text_fusion
        dit.text_fusion = _Fused()
        self.average = copy.deepcopy(dit).requires_grad_(False)
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in dit.named_parameters():
            hidden = "blocks." in name and parameter.ndim == 2 and "table" not in name
            (matrices if hidden else others).append(parameter)
        self.guided = Guided(dit)
        others += self.guided.asks.parameters()
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=10 * lr),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "guided": self.guided.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.guided.load_state_dict(state["guided"])
        self.average.load_state_dict(state["average"])
        for optimizer, its in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.steps = state["steps"]

    def step(self, loss: Tensor, scale: float) -> None:
        """One step down.

        Args:
            loss: to make smaller.
            scale: of the learning rates.
        """
        loss.backward()
        nn.utils.clip_grad_norm_(self.guided.parameters(), 1.0)
        warm = min(1.0, (self.steps + 1) / 100)
        for optimizer, lr in zip(self._optimizers, (10 * self._lr, self._lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale * warm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(_EMA, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.guided.dit.parameters()), 1 - keep
            )

    def finished(self) -> Any:
        """The average as a whole DiT, with the text fusion back in its place."""
        dit = copy.deepcopy(self.average)
        dit.text_fusion = self._fusion
        return dit


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
        batch = Batch(padded, mask, x, None, rows, columns)
        x = x + (then - now) * velocity(dit, batch, x, torch.full((len(x),), now))
    return x
