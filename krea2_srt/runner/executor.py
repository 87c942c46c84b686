"""The engine's executor on the model runner: keeps the tensors of the sequences in the engine."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krea2_srt.engine.lifecycle import Request, Sequence
from krea2_srt.engine.work import PackStep, StepResult
from krea2_srt.errors import OutOfMemoryError, not_finite
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.pixels import quantize
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.device_state import DeviceState, all_or_none
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import PackForward
from krea2_srt.runner.side_stream import SideJob, SideStream
from krea2_srt.runner.steps_in_flight import StepsInFlight


class RunnerExecutor:
    """See `krea2_srt.engine.work.Executor`.

    Args:
        runner: runs the model.
        tile: see `VAEDecoder.decode`.
        side_stream: where decodes run beside the steps; None runs them in slices between them.
        max_overlapped_decodes: at a time; a 2048 x 2048 one takes gigabytes of activations.
    """

    def __init__(
        self,
        runner: Krea2Runner,
        tile: int | None = None,
        side_stream: SideStream | None = None,
        max_overlapped_decodes: int = 2,
    ) -> None:
        self._runner = runner
        self._tile = tile
        self._side_stream = side_stream
        self._max_overlapped_decodes = max_overlapped_decodes
        self._states: dict[Sequence, DeviceState] = {}
        self._steps: dict[PackStep, PackForward] = {}
        self._in_flight = StepsInFlight(runner.device)
        self._flops = self._weight_bytes = 0.0

    @property
    def overlaps_decodes(self) -> bool:
        return self._side_stream is not None

    @property
    def full_schedule_graphs(self) -> bool:
        return self._runner.graphs is not None

    @property
    def empty(self) -> bool:
        """Whether it holds no tensors of any sequence."""
        return not self._states and not self._steps

    def adapters_fit(self, digests: Collection[str]) -> bool:
        return self._runner.adapters.fit(digests)

    @torch.inference_mode()
    def encode(self, requests: Collection[Request]) -> None:
        sequences = [sequence for request in requests for sequence in request.sequences]
        with self._working():
            states = self._runner.encode_sequences(sequences)
        self._states.update(zip(sequences, states, strict=True))

    @torch.inference_mode()
    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        self._count_step(step, len(blocks) / step.total_blocks)
        states = [self._states[sequence] for sequence in step.sequences]
        with self._working(), all_or_none(states):
            self._runner.begin(states)
            began = self._in_flight.begin()
            flags = self._launch(step, states, blocks)
            return self._in_flight.launched(step, blocks, flags, began)

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        return self._in_flight.settle(sequence)

    def drop_step(self, step: PackStep) -> None:
        self._steps.pop(step, None)

    def decode(self, sequence: Sequence) -> bool:
        state = self._states[sequence]
        if state.decode is None and self._decodes_overlapped >= self._max_overlapped_decodes:
            return False
        try:
            with self._working():
                if state.decode is None:
                    state.decode = self._begun_decode(state)
                found = state.decode.result()
        except Exception:
            state.decode = None  # the next try begins anew
            raise
        if found is None:
            return False
        state.decode = None
        pixels, finite = found
        if not finite:
            raise not_finite("the picture")
        state.pixels = pixels.numpy()
        return True

    def release(self, sequence: Sequence) -> None:
        if (state := self._states.get(sequence)) is not None:
            state.release()
            self._forget_if_empty(state)

    def take_pixels(self, sequence: Sequence) -> np.ndarray | None:
        """uint8 [height, width, 3] of a decoded sequence, forgotten here; None of any other."""
        state = self._states.get(sequence)
        if state is None:
            return None
        pixels, state.pixels = state.pixels, None
        self._forget_if_empty(state)
        return pixels

    def predict(self, sequence: Sequence) -> Tensor | None:
        """Small latents of the picture as its last step predicts it; None if unknown: before that
        step, nobody wanted previews.
        """
        state = self._states.get(sequence)
        if state is None or state.velocity is None:
            return None
        with self._working():
            return self._runner.predicted_latents(state)

    def render_preview(self, latents: Tensor) -> "Preview":
        """Decode, or where decodes are overlapped begin to decode, what `predict` has
        given.
        """

        def decode() -> tuple[Tensor, ...]:
            return (quantize(self._runner.vae.decode(latents[None])[0]),)

        with self._working():
            if self._side_stream is None:
                return Preview(_Done(decode()))
            return Preview(self._side_stream.start(decode, (latents,)))

    def statistics(self) -> dict[str, Any]:
        """Counters of the steps, the graphs, the prompt cache, adapters, and streamed blocks where
        there are any; on a GPU also its memory in bytes. ``graph_failures`` says in words which
        graphs could not be captured, and why.
        """
        contexts, device = self._runner.contexts, self._runner.device
        found = {
            "step_flops": self._flops,
            "step_weight_bytes": self._weight_bytes,
            "context_cache_hits": contexts.hits,
            "context_cache_misses": contexts.misses,
            "context_cache_bytes": contexts.num_bytes,
            **self._runner.graph_statistics(),
            **self._runner.adapters.statistics(),
            **self._runner.streaming_statistics(),
        }
        if device.type == "cuda":
            found["device_memory_bytes"] = torch.cuda.memory_reserved(device)
            found["device_memory_peak_bytes"] = torch.cuda.max_memory_reserved(device)
        return found

    def release_graphs(self) -> None:
        """The weights move: wait for all that reads them, and forget the graphs, none of which may
        be replayed any more.
        """
        with device_errors():
            if self._side_stream is not None:
                self._side_stream.wait()
            if self._runner.stream is not None:
                self._runner.stream.synchronize()
        self._runner.release_graphs()

    def release_memory(self) -> None:
        """The weights are about to leave the device: so does all that can be made anew."""
        self.release_graphs()
        self._runner.release_memory()

    def close(self) -> None:
        """End the thread that launches decodes, where there is one."""
        if self._side_stream is not None:
            self._side_stream.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """On the runner's stream, with what the device raises as our errors."""
        try:
            with device_errors(), self._runner.on_stream():
                yield
        except OutOfMemoryError:
            self._runner.memory_freed()
            raise

    def _launch(self, step: PackStep, states: list[DeviceState], blocks: range) -> Tensor | None:
        """Flags of the branches that are no longer finite; None before the last block.

        A function of its own: its frame goes with the tensors of a step that fails.
        """
        if len(blocks) == step.total_blocks:
            return self._runner.launch(states, step.steps)
        forward = self._steps.get(step)
        if forward is None:
            forward = self._runner.begin_step(states)
        forward.run(blocks)
        if blocks.stop < step.total_blocks:
            self._steps[step] = forward
            return None
        flags = forward.finish()
        self._steps.pop(step, None)
        return flags

    def _count_step(self, step: PackStep, share: float) -> None:
        """Count what a share of a step takes at least: operations, and weights read once."""
        dit, share = self._runner.dit, share * step.steps
        branches = [tokens for sequence in step.sequences for tokens in sequence.tokens]
        self._flops += share * sum(step_flops(dit.config, branches))
        self._weight_bytes += share * step_weight_bytes(dit.config) * dit.dtype.itemsize

    @property
    def _decodes_overlapped(self) -> int:
        """Decodes under way beside the steps."""
        if self._side_stream is None:
            return 0
        return sum(state.decode is not None for state in self._states.values())

    def _begun_decode(self, state: DeviceState) -> SideJob:
        """The decode of a sequence, in slices or beside the steps: pixels, and whether they are
        finite.
        """
        if self._side_stream is None:
            return _Slices(self._runner.decode_slices(state, self._tile))
        # A copy: the sequence may be released while its decode is under way.
        decoded = replace(state)

        def decode() -> tuple[Tensor, ...]:
            *_, pixels = self._runner.decode_slices(decoded, self._tile)
            assert pixels is not None
            return _checked(pixels)

        return self._side_stream.start(decode, (state.tokens,))

    def _forget_if_empty(self, state: DeviceState) -> None:
        if state.empty:
            del self._states[state.sequence]


class Preview:
    """A small picture that is being decoded.

    Args:
        job: what decodes it.
    """

    def __init__(self, job: SideJob) -> None:
        self._job = job

    def pixels(self) -> np.ndarray | None:
        """uint8 [height, width, 3], at most 256 x 256; None as long as it is not there."""
        with device_errors():
            found = self._job.result()
        return None if found is None else found[0].numpy()


@dataclass(frozen=True)
class _Done:
    """Work that was over when it was started."""

    tensors: tuple[Tensor, ...]

    def result(self) -> tuple[Tensor, ...]:
        return self.tensors


@dataclass(frozen=True)
class _Slices:
    """A decode of which a slice is done whenever somebody looks at it."""

    slices: Iterator[Tensor | None]

    def result(self) -> tuple[Tensor, ...] | None:
        pixels = next(self.slices)
        return None if pixels is None else tuple(found.cpu() for found in _checked(pixels))


def _checked(pixels: Tensor) -> tuple[Tensor, ...]:
    """uint8 [height, width, 3], and whether all of it is finite."""
    return quantize(pixels), torch.isfinite(pixels).all()
