"""Does, before the first request, what would otherwise hold up the first ones of each kind."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from krea2_srt.errors import OutOfMemoryError
from krea2_srt.model.latents import LATENT_CHANNELS, VAE_SCALE
from krea2_srt.request import MAX_TEXT_TOKENS, ImageRequest
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.graph_race import GraphRace, Timer
from krea2_srt.runner.graphs import MAX_PROMPT_LENGTH, MAX_PROMPTS
from krea2_srt.runner.model_runner import Krea2Runner

logger = logging.getLogger(__name__)

SIDES = (1024, 512, 256, 768)
"""Pixels. The likeliest first."""

WHOLE_SIDES = (256,)
"""Sides of images whose whole schedule is captured as one graph too; larger ones exceed a turn."""

TEXT_TOKENS = (24, 48, 12, 80, 128, 192, 272)
"""From a few words to a long paragraph; each stands for the lengths of its bucket."""

PROMPT_LENGTHS = (64, 96, 128, 160, 224, 320)
"""Lengths of the text encoder's input that have graphs: a template, then the prompt."""


def warm_up(
    runner: Krea2Runner,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    race: bool = True,
) -> None:
    """Capture common graphs and generate pictures of common sizes, the likeliest first.

    Args:
        runner: on a GPU.
        seconds: after which nothing further is begun.
        clock: seconds.
        race: whether graphs are given up from the size on where they do not win.
    """
    start = clock()
    done = True
    for prepare in _preparations(runner, race):
        if clock() - start >= seconds:
            done = False
            break
        prepare()
    count = sum(map(len, runner.all_graphs))
    logger.info(
        "krea2-srt: warm after %.1f s, with %d CUDA graphs%s",
        clock() - start,
        count,
        "" if done else "; others follow when their sizes come",
    )


def _preparations(runner: Krea2Runner, race: bool) -> Iterator[Callable[[], object]]:
    text_graphs = runner.prompt_encoder.graphs
    steps = runner.sampling.default_steps
    if runner.graphs is not None and race:
        yield partial(keep_winners, runner)
    if runner.graphs is not None:
        yield runner.graphs.prime
    if text_graphs is not None:
        yield partial(text_graphs.prepare, MAX_PROMPTS, MAX_PROMPT_LENGTH)
    for number, text in enumerate(TEXT_TOKENS):
        if text_graphs is not None and number < len(PROMPT_LENGTHS):
            yield partial(text_graphs.prepare, 1, PROMPT_LENGTHS[number])
        for side in SIDES:
            if runner.graphs is not None:
                yield partial(_capture, runner, text, side, 1)
            if runner.graphs is not None and side in WHOLE_SIDES:
                yield partial(_capture, runner, text, side, steps)
            if number == 0:
                yield partial(_decode, runner, side)


def keep_winners(runner: Krea2Runner, timer: Timer | None = None) -> None:
    """Keep graphs up to the largest of `SIDES` where a step on one is faster than without.

    Args:
        runner: with graphs; without any where they never win.
        timer: see `GraphRace`.
    """
    graphs = runner.graphs
    assert graphs is not None
    sides = sorted(SIDES, reverse=True)
    laps = GraphRace(runner, timer).run(_sequence(runner, TEXT_TOKENS[0], s, 1) for s in sides)
    most = graphs.max_tokens
    if laps and not laps[-1].wins:
        runner.graphs, most = None, 0
    elif len(laps) > 1:
        most = min(most, laps[-1].image_tokens + MAX_TEXT_TOKENS)
        graphs.limit_to(most)
    logger.info("krea2-srt: graphs up to %d tokens: %s", most, "; ".join(map(str, laps)))
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()


def _capture(runner: Krea2Runner, text: int, side: int, steps: int) -> None:
    runner.prepare([_sequence(runner, text, side, runner.sampling.default_steps)], steps)


def _sequence(runner: Krea2Runner, text: int, side: int, steps: int) -> DeviceState:
    context = torch.zeros(
        text, runner.dit.config.hidden_size, dtype=runner.dit.dtype, device=runner.device
    )
    return runner.start(ImageRequest("", side, side, steps), [context])


def _decode(runner: Krea2Runner, side: int) -> None:
    """Where pictures are decoded later: cuDNN keeps its plans by thread."""
    size = side // VAE_SCALE
    latents = torch.zeros(1, LATENT_CHANNELS, size, size, device=runner.device)
    try:
        with device_errors():
            if runner.side_stream is None:
                runner.vae.decode(latents)
            else:
                job = runner.side_stream.start(lambda: (runner.vae.decode(latents),), (latents,))
                runner.side_stream.wait()
                job.result()
    except OutOfMemoryError as error:
        # The memory plan may still be right for one picture at a time, or for smaller ones.
        logger.warning("krea2-srt: no %d x %d picture while starting: %s", side, side, error)
