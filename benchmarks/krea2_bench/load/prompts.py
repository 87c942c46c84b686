"""The prompts that come with us: a few hundred, in thirteen languages, of 3 to 490 tokens.

Their tokens were counted with Krea 2's tokenizer; a test counts them again.
"""

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from krea2_bench.load.mix import MixError

_FILE = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """A prompt, its tokens (without the template's) and its language (ISO 639-1)."""

    tokens: int
    text: str
    language: str


@cache
def bundled_prompts() -> tuple[Prompt, ...]:
    """All of them, shortest first."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return tuple(sorted((Prompt(**json.loads(line)) for line in lines), key=lambda p: p.tokens))


def draw_prompt(tokens: tuple[int, int], rng: np.random.Generator) -> Prompt:
    """One of the prompts with this few to this many tokens.

    Raises:
        MixError: there is none.
    """
    low, high = tokens
    found = bundled_prompts()
    first = bisect_left(found, low, key=lambda p: p.tokens)
    end = bisect_right(found, high, key=lambda p: p.tokens)
    if first == end:
        longest = found[-1].tokens
        raise MixError(
            f"mix: there is no prompt of {low}-{high} tokens; they have {found[0].tokens} to "
            f"{longest}, with gaps between the longest"
        )
    return found[int(rng.integers(first, end))]


def nearest_prompt(tokens: int, rng: np.random.Generator) -> Prompt:
    """One of the prompts whose length is nearest to this."""
    gap = min(abs(prompt.tokens - tokens) for prompt in bundled_prompts())
    nearest = [p for p in bundled_prompts() if abs(p.tokens - tokens) == gap]
    return nearest[int(rng.integers(len(nearest)))]
