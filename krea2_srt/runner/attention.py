"""The choice among attention back ends, by trial and by measurement."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from krea2_srt.errors import ConfigError, first_line
from krea2_srt.kernels.operations import default_operations
from krea2_srt.kernels.quantize import Tokens
from krea2_srt.model.attention import FusedGateAttention, attend_and_gate
from krea2_srt.runner.attention_backends import PACKAGES, SDPA, AttentionBackend, known_backends
from krea2_srt.runner.attention_trial import (
    gate_view,
    packed_projection,
    projection_views,
    trial_capture,
    trial_fault,
)

logger = logging.getLogger(__name__)

LARGE_PACK = (4160,)
"""Segments of the pack on which the eager back end is chosen: one image of 1024 x 1024."""

SMALL_PACK = (300, 290, 310, 280)
"""The same for graphs: four images of 256 x 256."""

CROSSOVER_TOKENS = 2048
"""Attention is 6% of a step here and grows; launching kernels one by one costs less and less."""

_REPEATS = 7


@dataclass(frozen=True)
class AttentionChoice:
    """What attends.

    Attributes:
        eager: where no graph runs.
        graph: in graphs; None if nothing can be captured.
    """

    eager: AttentionBackend
    graph: AttentionBackend | None

    @property
    def max_graph_tokens(self) -> float:
        """Tokens of a pack from which on the eager back end gains more than a graph would."""
        return float("inf") if self.graph is self.eager else CROSSOVER_TOKENS

    @property
    def name(self) -> str:
        """One name, or both where they differ."""
        names = [self.eager.name] + ([self.graph.name] if self.graph else [])
        return "+".join(dict.fromkeys(names))


SDPA_ONLY = AttentionChoice(SDPA, None)

Timer = Callable[[Callable[[], object]], float]


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    forced: str = "auto",
    candidates: Mapping[str, AttentionBackend] | None = None,
    timer: Timer | None = None,
    fused_gate: bool = True,
) -> AttentionChoice:
    """Try and time what there is on a device; some seconds on a GPU.

    A candidate that does not build, does not run, does not agree with float64, or cannot be
    captured though it says so, is out; the log says why.

    Args:
        device, dtype: of the model.
        forced: a candidate's name, to have no other.
        candidates: by name; `known_backends` by default.
        timer: milliseconds of a function's work on the device.
        fused_gate: whether a back end may gate what it writes. The race is then of attention and
            gate. Not where a quantisation takes the gate along, nor without Triton's kernels.

    Raises:
        ConfigError: the forced one is unknown, is not installed, or fails its trial.
    """
    candidates = known_backends() if candidates is None else candidates
    if forced != "auto" and forced not in candidates:
        if forced in PACKAGES:
            raise ConfigError(f"attention: {forced} is not installed; it needs {PACKAGES[forced]}")
        known = ", ".join(["auto", *candidates])
        raise ConfigError(f"attention: must be one of {known}, got {forced!r}")
    if not _can_flash(device, dtype):
        if forced not in ("auto", SDPA.name):
            raise ConfigError(f"attention: {forced} does not run on {device} in {dtype}")
        return SDPA_ONLY
    if forced != "auto":
        backend = candidates[forced]
        if reason := trial_fault(backend, device, dtype):
            raise ConfigError(f"attention: {forced} fails on this device: {reason}")
        return AttentionChoice(backend, backend if backend.capturable else None)
    race = _Race(device, dtype, timer or cuda_milliseconds, fused_gate)
    race.run(candidates.values())
    return race.choice()


class _Race:
    """Times of the candidates, and why the others are out.

    Attributes:
        eager: milliseconds on `LARGE_PACK`, by name.
        graph: on `SMALL_PACK`, of those that can be captured.
        out: reasons, by name.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, timer: Timer, fused_gate: bool
    ) -> None:
        self._device, self._dtype, self._timer = device, dtype, timer
        self._fused_gate = fused_gate
        self._entered: dict[str, AttentionBackend] = {}
        self.eager: dict[str, float] = {}
        self.graph: dict[str, float] = {}
        self.out: dict[str, str] = {}

    def run(self, candidates: Iterable[AttentionBackend]) -> None:
        major, reserves = _major(self._device), []
        for backend in candidates:
            if isinstance(backend.attend, FusedGateAttention) and not self._fused_gate:
                self.out[backend.name] = "its gate is of no use here"
            elif backend.majors is None or major in backend.majors:
                self._enter(backend)
            elif major in backend.reserve:
                reserves.append(backend)
            elif backend.majors:
                made_for = ", ".join(f"{m}.x" for m in backend.majors)
                self.out[backend.name] = f"made for compute capability {made_for}"
            else:
                self.out[backend.name] = "only by name"
        fastest = min(self.graph, key=self.graph.__getitem__) if self.graph else ""
        for backend in reserves:
            if fastest and self._entered[fastest].majors is not None:
                self.out[backend.name] = f"takes half a minute to build, and {fastest} is there"
            else:
                self._enter(backend)

    @torch.inference_mode()
    def _enter(self, backend: AttentionBackend) -> None:
        """Try and time one."""
        if reason := trial_fault(backend, self._device, self._dtype):
            self.out[backend.name] = reason
            return
        try:
            times = self._time(backend)
        except Exception as error:  # it does small packs and not large ones, or memory ran out
            self.out[backend.name] = first_line(error)
            return
        self._entered[backend.name] = backend
        self.eager[backend.name] = times[0]
        if backend.capturable:
            self.graph[backend.name] = times[1]

    def _time(self, backend: AttentionBackend) -> tuple[float, float]:
        eager = self._timer(self._work(backend, LARGE_PACK))
        if not backend.capturable:
            return eager, 0.0
        launch = self._work(backend, SMALL_PACK)
        if self._device.type != "cuda":
            return eager, self._timer(launch)
        # As it will run: launched one by one, kernels of so few tokens wait for the host. What the
        # graph reads is the launch's, which lives until it is timed.
        return eager, self._timer(trial_capture(self._device)(launch))

    def _work(self, backend: AttentionBackend, lengths: tuple[int, ...]) -> Callable[[], Tokens]:
        """What is timed of a pack: attention, and the gate where that makes a difference."""
        fused, segments = packed_projection(lengths, self._device, self._dtype)
        q, k, v = projection_views(fused)
        if not self._fused_gate:
            return torch.inference_mode()(lambda: backend.attend(q, k, v, segments))
        gate, do = gate_view(fused), default_operations(self._device)
        return torch.inference_mode()(
            lambda: attend_and_gate(backend.attend, q, k, v, gate, segments, do)
        )

    def choice(self) -> AttentionChoice:
        """The fastest, which the log tells with all times and reasons in one line."""
        entered, chosen = self._entered, SDPA_ONLY
        if entered:
            chosen = AttentionChoice(
                entered[min(entered, key=lambda name: self._handicapped(name))],
                entered[min(self.graph, key=self.graph.__getitem__)] if self.graph else None,
            )
        logger.info(
            "krea2-srt: attention %s; ms at 1024x1024: %s; at 4 of 256x256 in a graph: %s; out: %s",
            chosen.name,
            _listed(self.eager),
            _listed(self.graph),
            ", ".join(f"{name} ({reason})" for name, reason in self.out.items()) or "none",
        )
        return chosen

    def _handicapped(self, name: str) -> float:
        """A plan for every new length costs the requests that bring it."""
        return self.eager[name] * (1.1 if self._entered[name].plans else 1.0)


def _listed(times: Mapping[str, float]) -> str:
    rising = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {ms:.3g}" for name, ms in rising) or "none"


def cuda_milliseconds(function: Callable[[], object]) -> float:
    """Median time of a function's work on the current CUDA device."""
    for _ in range(2):
        function()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _can_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is more than SDPA: all kernels need 16 bits, and Ampere or newer."""
    return (
        device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _major(device) >= 8
    )
