"""Measures settings of the threads' waiting in processes that live side by side and take turns."""

import argparse
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from krea2_bench.worker_process import WorkerProcess

BESIDE_SIDES = (256,) * 8
"""Generated one after the other, alone and beside a process that computes."""

MIXED_SIDES = (256, 256, 256, 512, 256, 256, 256, 512)
"""Generated at once, in packs: what a saturated server does."""

_SHARE_S = 0.5
"""For the neighbour to have got its share of the cores."""


@dataclass(frozen=True)
class Setting:
    """A way for threads to wait.

    Attributes:
        name: as it was typed.
        variables: of OpenMP's library; None are those that our processes get.
    """

    name: str
    variables: Mapping[str, str] | None = field(hash=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """``ours``, ``default``, ``passive``, ``active``, or a spin count."""
        match text:
            case "ours":
                return cls(text, None)
            case "default":
                return cls(text, {})
            case "passive" | "active":
                return cls(text, {"OMP_WAIT_POLICY": text})
        if text.isdecimal():
            return cls(text, {"GOMP_SPINCOUNT": text})
        raise argparse.ArgumentTypeError(
            f"must be ours, default, passive, active or a spin count, got {text!r}"
        )


OURS = Setting.parse("ours")
DEFAULT = Setting.parse("default")


@dataclass
class Times:
    """What a setting took, in ms.

    Attributes:
        alone, beside: each of the `BESIDE_SIDES`, by rounds.
        mixed: all of the `MIXED_SIDES`, by rounds.
    """

    alone: list[list[float]] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)
    mixed: list[float] = field(default_factory=list)

    @property
    def alone_ms(self) -> float:
        """Milliseconds of a picture alone, at the median."""
        return median(ms for found in self.alone for ms in found)

    @property
    def slowest(self) -> list[float]:
        """The slowest picture beside the neighbour by rounds, in times of `alone_ms`."""
        return [max(found) / self.alone_ms for found in self.beside]

    def mixed_ratios(self, reference: "Times") -> list[float]:
        """Time for the mix against another setting's, by rounds."""
        return [ms / other for ms, other in zip(self.mixed, reference.mixed, strict=True)]


class Engines:
    """A process for each setting, and a neighbour that computes when it is told to.

    All live at once, and one of them works at a time.
    """

    def __init__(self, children: Mapping[Setting, WorkerProcess], neighbour: WorkerProcess) -> None:
        self.times = {setting: Times() for setting in children}
        self._children = children
        self._neighbour = neighbour

    def generate_mix(self, rounds: int) -> None:
        """The mix by each setting, each round in the opposite order of the one before."""
        for number in range(rounds):
            for setting in list(self._children)[:: -1 if number % 2 else 1]:
                self.times[setting].mixed.append(self._generate(setting, MIXED_SIDES))

    def generate_beside(self, settings: Collection[Setting], rounds: int) -> None:
        """Single pictures by these settings, alone and then beside the neighbour."""
        for _ in range(rounds):
            for setting in settings:
                times = self.times[setting]
                times.alone.append(self._singles(setting))
                with self._busy_neighbour():
                    times.beside.append(self._singles(setting))

    def _singles(self, setting: Setting) -> list[float]:
        return [self._generate(setting, [side]) for side in BESIDE_SIDES]

    def _generate(self, setting: Setting, sides: Sequence[int]) -> float:
        return float(self._children[setting].ask({"sides": list(sides)})["ms"])

    @contextmanager
    def _busy_neighbour(self) -> Iterator[None]:
        self._neighbour.ask({"busy": True})
        time.sleep(_SHARE_S)
        try:
            yield
        finally:
            self._neighbour.ask({"busy": False})


@contextmanager
def running_engines(
    folder: Path, checkpoint: Path, settings: Sequence[Setting]
) -> Iterator[Engines]:
    """The processes, warmed up; they end with the context.

    Args:
        folder: for their logs.
        checkpoint: folder of the model.
        settings: one process each.
    """
    with ExitStack() as stack:

        def start(job: str, name: str, options: dict[str, Any]) -> WorkerProcess:
            process = WorkerProcess(job, checkpoint, folder, options, name=name, environment={})
            return stack.enter_context(process)

        neighbour = start("compute", "neighbour", {})
        neighbour.answer()

        # The first to start is slower than its twins, by a sixth here: it calibrates for all, and
        # is not measured.
        cost = start("generate", "calibrate", {"waiting": {}, "cost": None}).answer()["cost"]
        children = {}
        for setting in settings:
            options = {"waiting": setting.variables, "cost": cost}
            children[setting] = start("generate", f"generate-{setting.name}", options)
            children[setting].answer()
        engines = Engines(children, neighbour)
        for child in children.values():
            child.ask({"sides": list(MIXED_SIDES)})
        yield engines
