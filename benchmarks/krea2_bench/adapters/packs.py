"""One pack of four images, with a different adapter each and with none, in turn."""

import time
from pathlib import Path
from typing import Any

import torch

from krea2_bench.adapters.files import write_adapter
from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.threads import limit_spinning

IMAGES, SIDE, STEPS = 4, 256, 8


def pack_times(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of all steps of a pack.

    Args:
        model: checkpoint folder.
        folder: for the adapters.
        rounds: of both.

    Returns:
        ``without`` and ``with``, of each round.
    """
    limit_spinning()
    runner = Krea2Runner.load(
        Krea2Checkpoint.from_folder(model), torch.device("cpu"), torch.float32
    )
    uses = []
    for seed in range(IMAGES):
        file = folder / f"pack-{seed}.safetensors"
        write_adapter(model / "transformer", file, seed)
        uses.append(AdapterUse(file.stem, runner.adapters.load(file).digest))
    times: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(rounds + 1):
        for name, adapters in (("without", [None] * IMAGES), ("with", uses)):
            ms = _steps_ms(runner, _begun(runner, adapters))
            if number:  # the first warms up
                times[name].append(round(ms, 2))
    return times


def _begun(runner: Krea2Runner, adapters: list[Any]) -> list[DeviceState]:
    images = [
        ImageRequest(
            "a red circle",
            SIDE,
            SIDE,
            STEPS,
            seed=seed,
            adapters=frozenset() if use is None else frozenset({use}),
        )
        for seed, use in enumerate(adapters)
    ]
    states = runner.encode_sequences([lone_sequence(image) for image in images])
    runner.begin(states)
    return states


def _steps_ms(runner: Krea2Runner, states: list[DeviceState]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        runner.step(states)
    return (time.perf_counter() - start) * 1e3
