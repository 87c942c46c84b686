"""Adapters of many shapes, and packs of images with them."""

import torch

from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.layers import Linear
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner

RANK = 16
"""What the slots of these tests hold."""


class Factors:
    """Random factors, about as large as the weights.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def factor(self, linear: Linear, rank: int, start: int = 0, stop: int | None = None) -> Factor:
        """One of some rows of a matrix."""
        rows, width = linear.weight.shape
        out = (rows if stop is None else stop) - start
        down = torch.randn(rank, width, generator=self._generator) / width**0.5
        up = torch.randn(out, rank, generator=self._generator) / rank**0.5
        return Factor(down, up, start)

    def of_parts(self, linear: Linear, rank: int) -> tuple[Factor, ...]:
        """One of each part, as most trainers write them."""
        found, start = [], 0
        for rows in linear.parts.values():
            found.append(self.factor(linear, rank, start, start + rows))
            start += rows
        return tuple(found)


def of_all(dit: Krea2DiT, name: str, rank: int, seed: int) -> Adapter:
    """An adapter of every matrix of a model, those of prompts and schedules too."""
    factors = Factors(seed)
    linears = [(path, m) for path, m in dit.named_modules() if isinstance(m, Linear)]
    return Adapter(name, name, {path: factors.of_parts(m, rank) for path, m in linears})


def spanning(dit: Krea2DiT, name: str = "spanning", seed: int = 11) -> Adapter:
    """One factor of queries, keys and values, as LyCORIS has it; one of parts of two parts; and two
    in a part, which take all of a slot's rank.
    """
    factors = Factors(seed)
    block = dit.blocks[0]
    q, k, v, _ = block.attn.qkvg.parts.values()
    gate, _ = block.ff.gate_up.parts.values()
    matrices = {
        "blocks.0.attn.qkvg": (factors.factor(block.attn.qkvg, 5, 0, q + k + v),),
        "blocks.0.ff.gate_up": (factors.factor(block.ff.gate_up, 7, gate // 2, gate + gate // 2),),
        "blocks.1.ff.down": (
            factors.factor(block.ff.down, 6, 3, 20),
            factors.factor(block.ff.down, 10, 20, 41),
        ),
    }
    return Adapter(name, name, matrices)


def few(dit: Krea2DiT, name: str = "few", seed: int = 12) -> Adapter:
    """An adapter of one matrix."""
    factor = Factors(seed).factor(dit.blocks[1].attn.out, 3)
    return Adapter(name, name, {"blocks.1.attn.out": (factor,)})


def variety(dit: Krea2DiT) -> list[Adapter]:
    """Nine adapters that fit into slots of rank 16."""
    ranks = (16, 4, 9, 1, 13, 8, 2)
    every = [of_all(dit, f"all {rank}", rank, seed) for seed, rank in enumerate(ranks)]
    return [*every, spanning(dit), few(dit)]


def uses(**scales: float) -> frozenset[AdapterUse]:
    """Adapters by name, with ``_`` for a space."""
    names = {name.replace("_", " "): scale for name, scale in scales.items()}
    return frozenset(AdapterUse(name, name, scale) for name, scale in names.items())


def mixed() -> list[ImageRequest]:
    """Sizes, steps, guidance; none to four adapters each, some the same with another scale."""
    image = ImageRequest
    return [
        image("a cat", 64, 48, 3, seed=1, adapters=uses(all_16=0.8)),
        image("a cat", 32, 48, 4, seed=2),
        image("x", 48, 48, 3, 3.5, "rain", seed=3, adapters=uses(spanning=1.0, all_4=-0.7)),
        image("", 32, 32, 5, seed=4, adapters=uses(few=1.5, all_9=0.4, all_16=0.3, spanning=-1)),
        image("a dog", 64, 32, 3, seed=5, adapters=uses(few=-1.0)),
        image("a dog", 32, 32, 2, seed=6, adapters=uses(all_4=1.0, all_1=1.0, few=1.0)),
    ]


def begun(runner: Krea2Runner, images: list[ImageRequest]) -> list[DeviceState]:
    """Images before their first step."""
    states = runner.encode_sequences([lone_sequence(image) for image in images])
    runner.begin(states)
    return states


def finished(runner: Krea2Runner, images: list[ImageRequest]) -> list[torch.Tensor]:
    """Latents of images that are generated in one pack until each is done."""
    states = begun(runner, images)
    while pending := [state for state in states if not state.done]:
        assert runner.step(pending) == []
    return [state.tokens for state in states]
