"""Up to which size a step is faster on a graph than kernel by kernel, by measurement."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from krea2_srt.runner.device_state import DeviceState
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import ForwardBatch

LEAST_GAIN = 0.01
"""Share of a step's time that a graph must save: about what captures and padding cost."""

_STEPS, _REPEATS = 3, 3

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a function."""


@dataclass(frozen=True)
class Lap:
    """One step of a lone image both ways.

    Attributes:
        image_tokens: of the image.
        tokens: with its text.
        eager_ms, graph_ms: of a step.
    """

    image_tokens: int
    tokens: int
    eager_ms: float
    graph_ms: float

    @property
    def wins(self) -> bool:
        return self.graph_ms < self.eager_ms * (1 - LEAST_GAIN)

    def __str__(self) -> str:
        return f"at {self.tokens} tokens eager {self.eager_ms:.3g} ms, graph {self.graph_ms:.3g} ms"


class GraphRace:
    """Steps one image of some sizes both ways.

    Args:
        runner: with graphs.
        timer: by default the fastest of some runs of some steps each, after a first one.
    """

    def __init__(self, runner: Krea2Runner, timer: Timer | None = None) -> None:
        self._runner = runner
        self._timer = timer or partial(_fastest_ms, device=runner.device)

    @torch.inference_mode()
    def run(self, states: Iterable[DeviceState]) -> list[Lap]:
        """Time them until one wins: in smaller ones, what launches cost weighs more.

        Args:
            states: the largest first, each before its first step. Those too large for a graph,
                or that cannot be captured, are passed over.
        """
        laps: list[Lap] = []
        for state in states:
            if not self._runner.prepare([state]):
                continue
            eager_ms = self._timer(partial(self._step_eagerly, state))
            graph_ms = self._timer(partial(self._replay, state))
            lap = Lap(state.sequence.image.image_tokens, state.num_tokens, eager_ms, graph_ms)
            laps.append(lap)
            if lap.wins:
                break
        return laps

    def _step_eagerly(self, state: DeviceState) -> None:
        for _ in range(_STEPS):
            forward = self._runner.begin_step([state])
            forward.run(range(self._runner.num_blocks))
            forward.finish()
            state.sequence.step = 0

    def _replay(self, state: DeviceState) -> None:
        graphs = self._runner.graphs
        assert graphs is not None
        batch = ForwardBatch.of([state])
        for _ in range(_STEPS):
            graphs.step(batch, self._runner.packs.get(batch.shapes))
            state.sequence.step = 0


def _fastest_ms(function: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3 / _STEPS)
    return min(times[1:])
