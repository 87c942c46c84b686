"""How well a DiT draws what it is asked for: the judge's counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from krea2_srt.model.latents import unpatchify
from tools.demo_model.autoencoder import Codec, to_bytes
from tools.demo_model.diffusion import draw
from tools.demo_model.judge import Verdict, judge
from tools.demo_model.wish import Wish


@dataclass(frozen=True)
class Score:
    """Parts of the pictures that are right; see `judge.Verdict`."""

    colour: float
    shape: float
    background: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Score":
        def part(name: str) -> float:
            return sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)

        return cls(part("colour"), part("shape"), part("background"))

    def reaches(self, other: "Score") -> bool:
        """Whether no part is below the other's."""
        return all(value >= getattr(other, name) for name, value in vars(self).items())

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1%}" for name, value in vars(self).items())


class ImageGenerator:
    """Draws prompts in plain torch, as Turbo does, with a DiT in training.

    Args:
        encode: prompts to fused features.
        codec: of pictures.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[Tensor]], codec: Codec) -> None:
        self._encode, self._codec = encode, codec

    def paint(
        self, dit: nn.Module, prompts: Sequence[str], width: int, height: int, seed: int
    ) -> np.ndarray:
        """Bytes [n, height, width, 3]."""
        pictures = []
        for start in range(0, len(prompts), 16):
            features = self._encode(prompts[start : start + 16])
            tokens = draw(dit, features, height // 16, width // 16, seed + start)
            latents = torch.stack([unpatchify(it, height // 16, width // 16) for it in tokens])
            pictures.append(to_bytes(self._codec.decode(latents)))
        return np.concatenate(pictures)

    def score(
        self,
        dit: nn.Module,
        wishes: Sequence[tuple[Wish, str]],
        sizes: Sequence[tuple[int, int]],
        seed: int = 0,
    ) -> Score:
        """The score of one picture of each wish for which any size has room, sizes in turn."""
        by_size: dict[tuple[int, int], list[tuple[Wish, str]]] = {size: [] for size in sizes}
        for number, (wish, text) in enumerate(wishes):
            turn = number % len(sizes)
            with_room = [it for it in (*sizes[turn:], *sizes[::-1]) if wish.fits(*it)]
            if with_room:
                by_size[with_room[0]].append((wish, text))
        verdicts = []
        for (width, height), some in by_size.items():
            if some:
                pictures = self.paint(dit, [text for _, text in some], width, height, seed)
                verdicts += [judge(it, wish) for it, (wish, _) in zip(pictures, some, strict=True)]
        return Score.of(verdicts)
