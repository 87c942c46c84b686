"""What the DiT is trained on: captions' features and scenes' latents, made once, used often."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from krea2_srt.model.latents import patchify
from tools.demo_model.autoencoder import Codec, to_tensor
from tools.demo_model.guide import PATCH, answers
from tools.demo_model.precision import fast
from tools.demo_model.wish import Wish

_AT_ONCE = 64

TEXT_TOKENS = 32
"""A caption's are padded to so many, or a multiple: few shapes, each of which can be compiled."""


_SEVERAL = 4
"""So much more often than in captions there are several shapes: they are harder to draw."""


@dataclass(frozen=True)
class Batch:
    """Examples of one size, captions padded.

    Attributes:
        features: [n, tokens, hidden], fused.
        mask: bool [n, tokens], of the caption's own tokens.
        tokens: [n, image tokens, 64].
        answers: [n, image tokens, 5]; see `guide.answers`. None where nothing is learned.
        rows, columns: of image tokens.
    """

    features: Tensor
    mask: Tensor
    tokens: Tensor
    answers: Tensor | None
    rows: int
    columns: int


class Dataset:
    """Wishes with captions, and for each a scene of every size that it was drawn in.

    Args:
        wishes: what captions ask for.
        features: of the captions, fused: [tokens, hidden] each.
        codec: of pictures.
        seed: of what wishes leave to chance.
    """

    def __init__(
        self, wishes: Sequence[Wish], features: Sequence[Tensor], codec: Codec, seed: int
    ) -> None:
        self._wishes, self._features, self._codec = wishes, features, codec
        self._random = Random(seed)
        self._pictures: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {}

    def count(self, width: int, height: int) -> int:
        """How many scenes there are of a size."""
        return len(self._pictures.get((width, height), ()))

    def add_pictures(self, width: int, height: int, count: int) -> None:
        """So many scenes of one size, of wishes by chance."""
        pictures = self._pictures.setdefault((width, height), [])
        at_once = max(1, _AT_ONCE * 64 * 64 // (width * height))
        fitting = [i for i, wish in enumerate(self._wishes) if wish.fits(width, height)]
        often = [1 if self._wishes[index].lone else _SEVERAL for index in fitting]
        while count > 0:
            chosen = self._random.choices(fitting, often, k=min(count, at_once))
            scenes = [self._wishes[index].grant(width, height, self._random) for index in chosen]
            pixels = to_tensor(np.stack([scene.draw() for scene in scenes]))
            with fast():
                latents = self._codec.encode(pixels)
            for index, scene, latent in zip(chosen, scenes, latents, strict=True):
                tokens = patchify(latent.float().contiguous()).to(torch.bfloat16)
                pictures.append((index, tokens, answers(scene).to(torch.bfloat16)))
            count -= len(chosen)

    def batch(self, width: int, height: int, count: int, random: Random) -> Batch:
        """Some examples of one size, by chance."""
        chosen = random.choices(self._pictures[width, height], k=count)
        features, mask = pad([self._features[index] for index, *_ in chosen], TEXT_TOKENS)
        tokens = torch.stack([its for _, its, _ in chosen]).float()
        right = torch.stack([its for *_, its in chosen]).float()
        return Batch(features, mask, tokens, right, height // PATCH, width // PATCH)


def pad(features: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Captions' features in one float32 tensor, and the mask of their own tokens; see `Batch`."""
    longest = -(-max(map(len, features)) // multiple) * multiple
    padded = torch.zeros(len(features), longest, *features[0].shape[1:])
    mask = torch.zeros(len(features), longest, dtype=torch.bool)
    for row, feature in enumerate(features):
        padded[row, : len(feature)] = feature
        mask[row, : len(feature)] = True
    return padded, mask
