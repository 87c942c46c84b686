"""The text fusion, trained first and by itself: tokens are to say what the caption asks.

The DiT that comes after it need not learn to read while it learns to draw. All tokens say what is
true of the whole picture. Of the last ones, every other says what is at the left, or on top, and
the others what is at the right, or below: an image token then finds what is to be where it is by
attention alone. What tells whether a token says it is one linear layer for each question, which
nobody keeps.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.captions import caption
from tools.demo_model.dataset import pad
from tools.demo_model.scene import COLOURS, STYLES
from tools.demo_model.shapes import SHAPES
from tools.demo_model.wish import PLACES, SIZES, Asked, Wish, draw_wish

_BATCH = 64
_ENDING = 5
"""Tokens at the end, which are the same for all captions: each is to tell that it is this one.

By the distances to them, whose rotary positions are the origin, image tokens know where they are.
"""

_LR = 3e-3
_NOISE = 0.5
"""On the states, whose deviation is about 2: else the captions are learned by heart."""

_LOOK_EVERY = 500

_QUESTIONS: tuple[tuple[Callable[[Wish], object], tuple[object, ...]], ...] = (
    (lambda wish: wish.background[0], tuple(COLOURS)),
    (lambda wish: wish.background[-1], tuple(COLOURS)),
    (lambda wish: wish.asked[0].place, ("", *PLACES)),
    (lambda wish: wish.asked[0].count, (1, 2, 3)),
    (lambda wish: wish.upright if len(wish.asked) > 1 else None, (None, False, True)),
)
"""What all tokens of a caption are asked, and the answers that there are."""


_THING = {
    name: (None, *answers)
    for name, answers in (
        ("shape", tuple(SHAPES)),
        ("colour", tuple(COLOURS)),
        ("size", tuple(SIZES)),
        ("style", STYLES),
    )
}
"""What the last tokens are asked of one thing; the others are to answer that they speak of none."""


def draw_captions(count: int, random: Random, held_out: bool) -> list[tuple[Wish, str]]:
    """Wishes and their captions, all held out from training or none."""
    found: list[tuple[Wish, str]] = []
    while len(found) < count:
        wish = draw_wish(random)
        if wish.held_out == held_out:
            found.append((wish, caption(wish, random)))
    return found


@torch.no_grad()
def by_layer(fusion: Any, features: Sequence[Tensor]) -> list[Tensor]:
    """The part of the fusion that stays as it began: across the layers, token by token.

    Args:
        fusion: of the DiT.
        features: [tokens, layers, hidden] each.
    """
    lengths = [len(it) for it in features]
    states = torch.cat([it.float() for it in features])
    for block in fusion.layerwise_blocks:
        states = block(states)
    return list(states.split(lengths))


def refine(fusion: Any, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The part that is trained, padded: [n, tokens, hidden], and the mask of real tokens."""
    padded, mask = pad(states)
    fused = fusion.projector(padded.transpose(2, 3)).squeeze(-1)
    for block in fusion.refiner_blocks:
        fused = block(fused, attention_mask=mask[:, None, None])
    return fused, mask


@torch.no_grad()
def fuse(fusion: Any, states: Sequence[Tensor]) -> list[Tensor]:
    """Captions' fused features, [tokens, hidden] each, of what `by_layer` has made of them."""
    found: list[Tensor] = []
    for start in range(0, len(states), _BATCH):
        fused, mask = refine(fusion, states[start : start + _BATCH])
        found += [row[real] for row, real in zip(fused, mask, strict=True)]
    return found


def train(
    fusion: Any,
    wishes: Sequence[Wish],
    states: Sequence[Tensor],
    seed: int,
    steps: int,
    say: Callable[[str], None],
) -> float:
    """Train projector and refiner blocks on captions that have been through `by_layer`.

    Args:
        fusion: of the DiT.
        wishes, states: of each caption. The last tenth is not trained on, but looked at.
        seed: of the order.
        steps: as many.
        say: is told how it goes.

    Returns:
        Of the tokens that are looked at, how many answer all questions right.
    """
    answers = torch.tensor([_answers(wish) for wish in wishes])
    among = [*(among for _, among in _QUESTIONS), *_THING.values()]
    sizes = [*map(len, among), _ENDING + 1]
    hidden = states[0].shape[-1]
    asks = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, sum(sizes)))
    trained = nn.ModuleList([fusion.projector, fusion.refiner_blocks, asks])
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_LR, betas=(0.9, 0.98), weight_decay=0.0)
    random = Random(seed)
    known = len(states) * 9 // 10
    by_length = sorted(range(known), key=lambda index: len(states[index]))
    all_right = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / 100) * min(1.0, 2.5 * (1 - step / steps))
        first = random.randrange(known - _BATCH + 1)
        chosen = by_length[first : first + _BATCH]
        shaken = [it + _NOISE * torch.randn(it.shape) for it in (states[i] for i in chosen)]
        told, expected = _told(fusion, asks, shaken, answers[chosen])
        loss = torch.stack(
            [
                F.cross_entropy(said, right)
                for said, right in zip(told.split(sizes, 1), expected.unbind(1), strict=True)
            ]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % _LOOK_EVERY and step + 1 < steps:
            continue
        with torch.no_grad():
            told, expected = _told(fusion, asks, states[known:], answers[known:])
        said = torch.stack([its.argmax(1) for its in told.split(sizes, 1)], dim=1)
        all_right = float((said == expected).all(1).float().mean())
        say(f"reading: step {step + 1}, loss {loss.item():.3f}, all answers right {all_right:.1%}")
    return all_right


def _answers(wish: Wish) -> list[list[int]]:
    """Right ones, of each token from the end."""
    of_all = [among.index(of(wish)) for of, among in _QUESTIONS]

    def of_one(asked: Asked) -> list[int]:
        return [among.index(getattr(asked, name)) for name, among in _THING.items()]

    first, *_, last = (of_one(it) for it in wish.in_order * 2)
    of_none = [among.index(None) for among in _THING.values()]
    ends = [last if number % 2 else first for number in range(_ENDING)]
    return [of_all + its for its in (*ends, of_none)]


def _told(
    fusion: Any, asks: nn.Module, states: Sequence[Tensor], answers: Tensor
) -> tuple[Tensor, Tensor]:
    """What each real token says, and what it should say."""
    fused, mask = refine(fusion, states)
    told: Tensor = asks(fused[mask])
    from_end = torch.cat([torch.arange(len(it) - 1, -1, -1) for it in states]).clamp(max=_ENDING)
    whose = torch.arange(len(states)).repeat_interleave(mask.sum(1))
    expected = answers[whose, from_end]
    return told, torch.cat([expected, from_end[:, None]], dim=1)
