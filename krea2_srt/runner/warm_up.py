"""Captures, before the first request, the graphs that most requests need."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from krea2_srt.runner.model_runner import Krea2Runner

logger = logging.getLogger(__name__)

SIDES = (1024, 512, 256, 768)
"""Pixels. The largest first: it makes the pool of memory that the others then fit into."""

WHOLE_SIDES = (256,)
"""Of which all steps are one graph too; those of larger images exceed a turn of the engine."""

TEXT_TOKENS = (24, 48, 12, 80, 128, 192, 272)
"""From a few words to a long paragraph; each stands for the lengths of its bucket."""

PROMPT_LENGTHS = (64, 96, 128, 160, 224, 320)
"""Of the text encoder's input, which has a template before the prompt."""


def prepare_graphs(
    runner: Krea2Runner, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Capture common graphs, the likeliest first.

    Args:
        runner: that uses graphs.
        seconds: after which no further one is begun.
        clock: seconds.

    Returns:
        How many there are.
    """
    start = clock()
    done = True
    for capture in _captures(runner):
        if clock() - start >= seconds:
            done = False
            break
        capture()
    count = sum(len(graphs) for graphs in (runner.graphs, runner.text_encoder.graphs) if graphs)
    logger.info(
        "krea2-srt: %d CUDA graphs captured in %.1f s%s",
        count,
        clock() - start,
        "" if done else "; the others follow when their sizes come",
    )
    return count


def _captures(runner: Krea2Runner) -> Iterator[Callable[[], bool]]:
    text_graphs = runner.text_encoder.graphs
    steps = runner.recipe.default_steps
    for number, text in enumerate(TEXT_TOKENS):
        if text_graphs is not None and number < len(PROMPT_LENGTHS):
            length = PROMPT_LENGTHS[number]
            yield partial(text_graphs.prepare, 1, length)
        for side in SIDES:
            yield partial(_prepare, runner, text, side, 1)
            if side in WHOLE_SIDES:
                yield partial(_prepare, runner, text, side, steps)


def _prepare(runner: Krea2Runner, text: int, side: int, steps: int) -> bool:
    context = torch.zeros(
        text, runner.dit.config.hidden_size, dtype=runner.dit.dtype, device=runner.device
    )
    schedule = runner.schedule(runner.recipe.default_steps, side, side)
    return runner.prepare([runner.start(context, side, side, 0, schedule)], steps)
