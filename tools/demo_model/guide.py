"""Questions to the DiT's image tokens, halfway: which thing are you part of?

What a prompt says of shapes shows in few pixels, so the loss of the velocity alone is slow to
teach which of two shapes belongs where. Nobody keeps the layers that are asked with. In the
literature: deep supervision.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.scene import COLOURS, STYLES, Scene
from tools.demo_model.shapes import SHAPES
from tools.demo_model.wish import REACH

PATCH = 16
"""Pixels a side of what an image token stands for."""

BLOCKS = (1, 2)
"""Those of the DiT's four whose image tokens are asked."""

_NONE = 0
"""The answer of tokens that are background; names begin at 1."""

_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(STYLES) + 1)


def answers(scene: Scene) -> Tensor:
    """Right ones: [image tokens, 5]; shape, colour and style, and where in its thing a token is.

    That is from the thing's middle, across and down, in radii; 0 for background.
    """
    rows, columns = scene.height // PATCH, scene.width // PATCH
    found = torch.zeros(rows, columns, 5)
    down = (torch.arange(rows) + 0.5)[:, None] * PATCH
    across = (torch.arange(columns) + 0.5)[None] * PATCH
    for thing in scene.things:
        x = (across - thing.x).expand(rows, columns)
        y = (down - thing.y).expand(rows, columns)
        part = torch.maximum(x.abs(), y.abs()) < REACH * thing.radius + PATCH / 2
        names = (list(SHAPES), thing.shape), (list(COLOURS), thing.colour), (STYLES, thing.style)
        for number, (among, name) in enumerate(names):
            found[..., number][part] = among.index(name) + 1.0
        found[..., 3][part] = (x / thing.radius)[part]
        found[..., 4][part] = (y / thing.radius)[part]
    return found.view(-1, 5)


class Guided(nn.Module):
    """A DiT that also answers.

    Args:
        dit: Diffusers' module; its text fusion's place taken by what hands features on.
    """

    def __init__(self, dit: Any) -> None:
        super().__init__()
        self.dit = dit
        hidden = dit.config.num_attention_heads * dit.config.attention_head_dim
        self.asks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, sum(_CLASSES) + 2)) for _ in BLOCKS
        )
        self._seen: dict[int, Tensor] = {}
        for block in BLOCKS:
            dit.transformer_blocks[block].register_forward_hook(self._keeping(block))

    def _keeping(self, block: int) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
            self._seen[block] = made

        return keep

    def forward(
        self, noisy: Tensor, features: Tensor, sigmas: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity [n, image tokens, 64] and what tokens say: [blocks, n, image tokens, m]."""
        velocity = self.dit(noisy, features, sigmas, ids, mask, return_dict=False)[0]
        text = features.shape[1]
        told = [
            ask(self._seen.pop(it)[:, text:]) for ask, it in zip(self.asks, BLOCKS, strict=True)
        ]
        return velocity, torch.stack(told)


def wrong(told: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How wrong, and of the last block's tokens in things, the part that knows the shape.

    Args:
        told: of `Guided`.
        right: [n, image tokens, 5]; see `answers`.
    """
    *said, where = told.float().split([*_CLASSES, 2], dim=-1)
    inside = right[..., 0] > _NONE
    loss = (where - right[..., 3:]).abs()[:, inside].mean()
    for number, its in enumerate(said):
        expected = right[..., number].long().expand(len(told), *right.shape[:2])
        loss = loss + F.cross_entropy(its.flatten(0, -2), expected.flatten())
    knows = said[0][-1][inside].argmax(-1) == right[..., 0][inside].long()
    return loss, knows.float().mean()
