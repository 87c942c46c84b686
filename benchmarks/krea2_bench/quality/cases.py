"""What is generated to be compared: prompts, with a seed and a size each."""

import argparse
from dataclasses import dataclass

import numpy as np

from krea2_bench.load.mix import parse_mix
from krea2_bench.load.prompts import bundled_prompts
from krea2_srt.errors import Krea2Error


class CaseError(Krea2Error):
    """Cases that cannot be; the message names the option."""


@dataclass(frozen=True)
class Case:
    """What to generate.

    Attributes:
        prompt, seed: of the picture.
        width, height: pixels.
        steps: denoising steps.
        guidance: Krea's scale; 0 is off.
    """

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float = 0.0


def cases_of(args: argparse.Namespace, default_count: int) -> list[Case]:
    """The cases that a command line asks for.

    Args:
        args: of `krea2-bench quality`.
        default_count: prompts of our own where it does not say how many.

    Raises:
        CaseError: there is no prompt, or no such size.
    """
    (kind,) = parse_mix(args.size)
    if kind.width % 16 or kind.height % 16:
        raise CaseError(f"--size: must be of multiples of 16, got {args.size}")
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        # Evenly over their lengths, and so over languages.
        every = bundled_prompts()
        places = (
            np.linspace(0, len(every) - 1, min(args.count or default_count, len(every)))
            .round()
            .astype(int)
        )
        prompts = [every[place].text for place in places]
    if not prompts:
        raise CaseError(f"--prompts: {args.prompts} holds no prompt")
    return [
        Case(prompt, args.seed + number, kind.width, kind.height, args.steps, args.guidance)
        for number, prompt in enumerate(prompts)
    ]
