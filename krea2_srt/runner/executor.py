"""The engine's executor on the model runner: keeps the tensors of the sequences in the engine."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krea2_srt.engine.lifecycle import Request, Sequence
from krea2_srt.engine.work import PackStep, StepResult
from krea2_srt.errors import OutOfMemoryError, not_finite
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.pixels import quantize, to_uint8
from krea2_srt.runner.device_errors import device_errors
from krea2_srt.runner.device_state import DeviceState
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
        self._contexts: dict[Sequence, list[Tensor]] = {}
        self._sequences: dict[Sequence, DeviceState] = {}
        self._steps: dict[PackStep, PackForward] = {}
        self._decodes: dict[Sequence, Iterator[Tensor | None]] = {}
        self._overlapped: dict[Sequence, SideJob] = {}
        self._pixels: dict[Sequence, np.ndarray] = {}
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
        held = (self._contexts, self._sequences, self._steps, self._decodes, self._overlapped)
        return not any(held) and not self._pixels

    @torch.inference_mode()
    def encode(self, requests: Collection[Request]) -> None:
        with self._working():
            prompts = list(dict.fromkeys(p for request in requests for p in request.prompts))
            contexts = dict(zip(prompts, self._runner.encode(prompts), strict=True))
        for request in requests:
            for sequence in request.sequences:
                image = sequence.image
                branches = [image.prompt, image.negative_prompt][: 2 if image.guidance else 1]
                self._contexts[sequence] = [contexts[prompt] for prompt in branches]
                sequence.tokens = tuple(
                    len(context) + image.image_tokens for context in self._contexts[sequence]
                )

    @torch.inference_mode()
    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        self._count_step(step, len(blocks) / step.total_blocks)
        with self._working():
            began = self._in_flight.begin()
            flags = self._launch(step, blocks)
            return self._in_flight.launched(step, blocks, flags, began)

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        return self._in_flight.settle(sequence)

    def drop_step(self, step: PackStep) -> None:
        self._steps.pop(step, None)

    def decode(self, sequence: Sequence) -> bool:
        if self._side_stream is not None:
            return self._decode_overlapped(sequence, self._side_stream)
        try:
            with self._working():
                return self._decode_slice(sequence)
        except Exception:
            self._decodes.pop(sequence, None)  # the next try begins anew
            raise

    def release(self, sequence: Sequence) -> None:
        for held in (self._contexts, self._sequences, self._decodes, self._overlapped):
            held.pop(sequence, None)

    def take_pixels(self, sequence: Sequence) -> np.ndarray | None:
        """uint8 [height, width, 3] of a decoded sequence, forgotten here; None of any other."""
        return self._pixels.pop(sequence, None)

    def enable_previews(self, sequence: Sequence) -> None:
        """Keep, from its next step on, what `predict` needs."""
        sequence.wants_previews = True
        if (denoising := self._sequences.get(sequence)) is not None:
            denoising.keep_velocity = True

    def predict(self, sequence: Sequence) -> Tensor | None:
        """Small latents of the picture as its last step predicts it; None if unknown."""
        denoising = self._sequences.get(sequence)
        if denoising is None or denoising.velocity is None:
            return None
        with self._working():
            return self._runner.predicted_latents(denoising)

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
        """Counters of the steps, the graphs and the prompt cache; on a GPU also its memory in
        bytes. ``graph_failures`` says in words which graphs could not be captured, and why.
        """
        contexts, device = self._runner.contexts, self._runner.device
        found = {
            "step_flops": self._flops,
            "step_weight_bytes": self._weight_bytes,
            "context_cache_hits": contexts.hits,
            "context_cache_misses": contexts.misses,
            "context_cache_bytes": contexts.num_bytes,
            **self._runner.graph_statistics(),
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

    def _launch(self, step: PackStep, blocks: range) -> Tensor | None:
        """Flags of the branches that are no longer finite; None before the last block.

        A function of its own: its frame goes with the tensors of a step that fails.
        """
        if len(blocks) == step.total_blocks:
            return self._runner.launch([self._begun(s) for s in step.sequences], step.steps)
        forward = self._steps.get(step)
        if forward is None:
            forward = self._runner.begin_step([self._begun(s) for s in step.sequences])
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

    def _begun(self, sequence: Sequence) -> DeviceState:
        """Its tensors; allocated before its first step, so that those that wait take no memory."""
        denoising = self._sequences.get(sequence)
        if denoising is None:
            denoising = self._runner.start_image(sequence.image, self._contexts[sequence])
            denoising.keep_velocity = sequence.wants_previews
            self._sequences[sequence] = denoising
        return denoising

    def _decode_slice(self, sequence: Sequence) -> bool:
        slices = self._decodes.get(sequence)
        if slices is None:
            slices = self._runner.decode_slices(self._sequences[sequence], self._tile)
            self._decodes[sequence] = slices
        pixels = next(slices)
        if pixels is None:
            return False
        if not torch.isfinite(pixels).all():
            raise not_finite("the picture")
        self._pixels[sequence] = to_uint8(pixels)
        return True

    def _decode_overlapped(self, sequence: Sequence, stream: SideStream) -> bool:
        job = self._overlapped.get(sequence)
        if job is None:
            if len(self._overlapped) < self._max_overlapped_decodes:
                denoising = self._sequences[sequence]
                with self._working():
                    self._overlapped[sequence] = stream.start(
                        lambda: self._decode_at_once(denoising), (denoising.tokens,)
                    )
            return False
        try:
            with self._working():
                found = job.result()
        except Exception:
            del self._overlapped[sequence]  # the next try begins anew
            raise
        if found is None:
            return False
        del self._overlapped[sequence]
        pixels, finite = found
        if not finite:
            raise not_finite("the picture")
        self._pixels[sequence] = pixels.numpy()
        return True

    def _decode_at_once(self, denoising: DeviceState) -> tuple[Tensor, ...]:
        *_, pixels = self._runner.decode_slices(denoising, self._tile)
        assert pixels is not None
        return quantize(pixels), torch.isfinite(pixels).all()


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
