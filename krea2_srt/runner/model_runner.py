"""The model runner: from prompts to contexts, from noise to latents, from latents to pixels."""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_srt.engine.lifecycle import Sequence as ImageSequence
from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.errors import CheckpointError, not_finite
from krea2_srt.lora.beside import UniformDeltas
from krea2_srt.lora.placed import NO_ADAPTERS, AdapterSet
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.slots import AdapterSlots
from krea2_srt.model.checkpoint import Krea2Checkpoint, SamplingDefaults
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import dit_config, load_dit
from krea2_srt.model.latents import SIZE_MULTIPLE, initial_noise, patchify, unpatchify
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.schedule import Schedule
from krea2_srt.model.text_encoder import TextEncoder, load_text_encoder, text_model
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_files import load_vae, vae_config
from krea2_srt.model.weights import WeightDelta
from krea2_srt.request import ImageRequest
from krea2_srt.runner.attention import AttentionChoice, choose_attention
from krea2_srt.runner.block_stream import BlockStream
from krea2_srt.runner.byte_cache import ByteCache
from krea2_srt.runner.caches import CacheBytes
from krea2_srt.runner.device_state import DeviceState, all_or_none
from krea2_srt.runner.graphs import Capture, Eager, StepGraphs, TextGraphs
from krea2_srt.runner.packing import ForwardBatch, PackCache, PackForward
from krea2_srt.runner.prompt_encoder import PromptEncoder
from krea2_srt.runner.schedule_modulation import ModulationRows, ScheduleModulation
from krea2_srt.runner.sequence_shape import branch_shapes
from krea2_srt.runner.side_stream import CudaSideStream
from krea2_srt.runner.upload_stream import CudaUploadStream, UploadStream
from krea2_srt.start_up import StartUp

STREAM_PRIORITY = -1
"""Priority of the steps' stream: the lower, the sooner. Decodes beside them have 0."""

PREVIEW_LATENTS = 32
"""Longest side of a preview's latents; its pixels are 8 times as many."""


def _check_that_parts_fit(checkpoint: Krea2Checkpoint, dtype: torch.dtype) -> None:
    """Refuse parts of other models by their configs, before any of them is read."""
    config = dit_config(checkpoint.transformer)
    text, _ = text_model(checkpoint.text_encoder, checkpoint.select_layers, dtype)
    layers, width = len(checkpoint.select_layers), text.config.hidden_size
    if (layers, width) != (config.num_text_layers, config.text_hidden_dim):
        raise CheckpointError(
            f"{checkpoint.text_encoder}: gives {layers} layers of width {width}, the transformer "
            f"reads {config.num_text_layers} of width {config.text_hidden_dim}"
        )
    vae_config(checkpoint.vae)


class Krea2Runner:
    """Runs the model. Knows tensors, no queues; not thread-safe.

    Args:
        dit, text_encoder, vae: the loaded parts, on one device.
        sampling: Turbo's or Raw's sampling.
        attention: how packs attend.
        caches: bounds of what is remembered.

    Attributes:
        graphs: replay steps where it can; None runs all eagerly.
        adapters: those that images can be generated with.
        block_stream: brings blocks from the host; None where all are on the device.
        start_up: how long loading took; None where nobody has timed it.
    """

    def __init__(
        self,
        dit: Krea2DiT,
        text_encoder: TextEncoder,
        vae: VAEDecoder,
        sampling: SamplingDefaults,
        attention: AttentionChoice,
        caches: CacheBytes = CacheBytes(),
    ) -> None:
        self.dit = dit
        self.text_encoder = text_encoder
        self.vae = vae
        self.sampling = sampling
        self.attention = attention
        self.prompt_encoder = PromptEncoder(text_encoder, dit, attention)
        self.graphs: StepGraphs | None = None
        self.block_stream: BlockStream | None = None
        self.start_up: StartUp | None = None
        self.device = dit.img_in.weight.device
        self.adapters = AdapterPool(dit)
        self.contexts: ByteCache[tuple[str, Hashable], Tensor] = ByteCache(caches.contexts)
        self._modulations: ModulationRows = ByteCache(caches.modulations)
        self.packs = PackCache(dit.config, self.device, caches.layouts)

    @classmethod
    def load(
        cls,
        checkpoint: Krea2Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        text_dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        deltas: Mapping[str, WeightDelta] = MappingProxyType({}),
        attention: AttentionChoice | None = None,
        text_encoder_resident: bool = True,
        streamed_blocks: Collection[int] = (),
        caches: CacheBytes = CacheBytes(),
    ) -> "Krea2Runner":
        """Load all parts straight onto one device.

        Args:
            checkpoint: where they lie.
            device: where they go.
            dtype: of the DiT, and of the other parts unless given.
            text_dtype, vae_dtype: of the text encoder and the VAE.
            quantization: of the DiT's blocks.
            deltas: what is added to the DiT's matrices for good; see `load_dit`.
            attention: overrides the choice by device, dtype and measurement.
            text_encoder_resident: see `load_text_encoder`.
            streamed_blocks: numbers of the DiT's blocks that come from host memory as they run; on
                a GPU only.
            caches: bounds of what is remembered.

        Raises:
            CheckpointError: something is missing, damaged or does not fit together.
            ConfigError: host memory cannot be pinned.
            AdapterError: the deltas are another model's.
        """
        _check_that_parts_fit(checkpoint, dtype)
        dit = load_dit(checkpoint.transformer, device, dtype, quantization, deltas, streamed_blocks)
        text_encoder = load_text_encoder(
            checkpoint.text_encoder,
            checkpoint.tokenizer,
            checkpoint.select_layers,
            device,
            text_dtype or dtype,
            text_encoder_resident,
        )
        vae = load_vae(checkpoint.vae, device, vae_dtype or dtype)
        runner = cls(
            dit,
            text_encoder,
            vae,
            checkpoint.sampling,
            attention or choose_attention(device, dtype),
            caches,
        )
        if dit.host_blocks:
            runner.stream_blocks(CudaUploadStream(device))
        return runner

    @cached_property
    def stream(self) -> "torch.cuda.Stream | None":
        """Where steps and prompts run on a GPU, before whatever else is to be run; see `on_stream`.
        None on a CPU.
        """
        if self.device.type != "cuda":
            return None
        return torch.cuda.Stream(self.device, priority=STREAM_PRIORITY)

    @cached_property
    def side_stream(self) -> CudaSideStream | None:
        """Where pictures are decoded on a GPU, beside the steps. None on a CPU."""
        return CudaSideStream(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Have what is called within run on `stream`, after all that the current one has been told.

        All that uses the runner's caches and graphs belongs on one stream: their memory is used
        again in its order.
        """
        stream = self.stream
        if stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        if current != stream:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], adapters: AdapterSet = NO_ADAPTERS) -> list[Tensor]:
        """Fused context [text tokens, hidden] of each prompt, from the cache where it is known.

        Args:
            prompts: any number.
            adapters: which all of them are fused with.
        """
        found: dict[str, Tensor] = {}
        new = []
        key = adapters.text_key
        for prompt in dict.fromkeys(prompts):
            known = self.contexts.get((prompt, key))
            if known is None:
                new.append(prompt)
            else:
                found[prompt] = known
        deltas = UniformDeltas.of(adapters) if key else None
        contexts = self.prompt_encoder.encode(new, deltas) if new else []
        for prompt, context in zip(new, contexts, strict=True):
            found[prompt] = context
            self.contexts.put((prompt, key), context)
        return [found[prompt] for prompt in prompts]

    def schedule(self, steps: int, width: int, height: int, mu: float | None = None) -> Schedule:
        """The checkpoint's schedule for an image size in pixels; ``mu`` overrides its shift."""
        image_tokens = (width // SIZE_MULTIPLE) * (height // SIZE_MULTIPLE)
        return self.sampling.schedule(steps, image_tokens, mu)

    @torch.inference_mode()
    def encode_sequences(self, sequences: Sequence[ImageSequence]) -> list[DeviceState]:
        """Encode the prompts of some sequences, each once for all that have the same adapters, and
        set their true `tokens`. They have no latents before `begin`.

        Raises:
            AdapterError: an adapter is not loaded.
        """
        adapters = [self.adapters.find(s.image.adapters) for s in sequences]
        prompts: dict[AdapterSet, dict[str, None]] = {}
        for sequence, own in zip(sequences, adapters, strict=True):
            prompts.setdefault(own, {}).update(dict.fromkeys(sequence.image.prompts))
        contexts = {
            own: dict(zip(some, self.encode(list(some), own), strict=True))
            for own, some in prompts.items()
        }
        return [
            self._state(s, [contexts[own][prompt] for prompt in s.image.prompts], own)
            for s, own in zip(sequences, adapters, strict=True)
        ]

    @torch.inference_mode()
    def begin(self, states: Sequence[DeviceState]) -> None:
        """Sample the noise of those that have none yet."""
        for state in states:
            if state.tokens is None:
                image = state.sequence.image
                noise = initial_noise(
                    image.width, image.height, image.seed, self.device, self.dit.dtype
                )
                state.tokens = patchify(noise).float()

    def start(self, image: ImageRequest, contexts: Sequence[Tensor]) -> DeviceState:
        """One image before its first step, of a request that is in no engine.

        Args:
            image: checked; for one image.
            contexts: [text tokens, hidden], of its prompt and, under guidance, of its negative
                prompt.

        Raises:
            ValueError: it has adapters, which the contexts are not known to have.
        """
        if image.adapters:
            raise ValueError("adapters: `encode_sequences` takes them")
        state = self._state(lone_sequence(image), contexts, NO_ADAPTERS)
        self.begin([state])
        return state

    @torch.inference_mode()
    def step(self, states: Sequence[DeviceState], steps: int = 1) -> list[DeviceState]:
        """One Euler step of every sequence, each at its own step, in one packed forward.

        A sequence under guidance takes part twice, with its prompt and its negative prompt.

        Args:
            states: the pack.
            steps: more than one only for a lone sequence before its first step: all that it has.

        Returns:
            The sequences whose latents are no longer finite.
        """
        flags = self.launch(states, steps).tolist()
        return ForwardBatch.of(states).non_finite(flags)

    @torch.inference_mode()
    def launch(self, states: Sequence[DeviceState], steps: int = 1) -> Tensor:
        """The same without waiting for the device.

        Returns:
            int32 [branches], not 0 where latents are no longer finite; the next step may
            overwrite it.
        """
        if steps > 1 and (flags := self._replay(states, steps)) is not None:
            return flags
        flags = None
        with all_or_none(states):
            for _ in range(steps):
                flags = self._replay(states, 1)
                if flags is None:
                    flags = self._run(states)
        assert flags is not None
        return flags

    def stream_blocks(self, uploads: UploadStream) -> None:
        """Have the blocks that are on the host come to the device as they run, from now on.

        Args:
            uploads: copies them.

        Raises:
            torch.OutOfMemoryError: there is no room for two of them.
        """
        self.block_stream = BlockStream(self.dit.host_blocks, self.device, uploads)
        self.dit.block_weights = self.block_stream
        with self.on_stream():
            self.block_stream.prepare()

    def use_graphs(
        self,
        capture: Capture,
        max_tokens: int,
        max_graphs: int = 256,
        adapter_slots: AdapterSlots | None = None,
    ) -> None:
        """Replay the steps that can be replayed from now on. The weights must stay where they are,
        or `release_graphs` be called before they move: no blocks may be streamed.

        Args:
            capture: how graphs are captured.
            max_tokens: of a pack that is replayed.
            max_graphs: kept at a time.
            adapter_slots: for packs with adapters, which run eagerly where they do not fit into
                these, or there are none.
        """
        assert self.attention.graph is not None
        assert self.block_stream is None
        self.graphs = StepGraphs(
            self.dit,
            self.attention.graph.attend,
            capture,
            max_tokens,
            max_graphs=max_graphs,
            adapter_slots=adapter_slots,
        )

    def use_text_graphs(self, capture: Capture) -> None:
        """The same for prompts; not possible where the text encoder is offloaded.

        Args:
            capture: not that of the steps, so that neither can spoil the other's memory.
        """
        self.prompt_encoder.use_graphs(capture)

    @property
    def all_graphs(self) -> list[StepGraphs | TextGraphs]:
        """Those that are in use."""
        both = (self.graphs, self.prompt_encoder.graphs)
        return [graphs for graphs in both if graphs is not None]

    def release_graphs(self) -> None:
        """Forget all graphs; they are captured anew when their packs come."""
        for graphs in self.all_graphs:
            graphs.release()

    def release_memory(self) -> None:
        """Give back all memory on the device that can be made anew: graphs with their buffers and
        the adapters' slots, buffers of streamed blocks, what is remembered of prompts, schedules
        and layouts, and adapters that can be read again.
        Sequences keep what they hold.
        """
        self.release_graphs()
        if self.block_stream is not None:
            self.block_stream.release()
        self.adapters.release()
        for cache in (self.contexts, self._modulations, self.packs):
            cache.clear()

    def memory_freed(self) -> None:
        """Memory was given back: graphs that found none may be tried again."""
        for graphs in self.all_graphs:
            graphs.record.memory_freed()

    def graph_statistics(self) -> dict[str, float | dict[str, str]]:
        """Counters of all graphs, and why what could not be captured could not; empty without
        graphs.
        """
        if not self.all_graphs:
            return {}
        records = [graphs.record for graphs in self.all_graphs]
        slots = self.graphs.adapter_slots if self.graphs is not None else None
        failures = {f"{r.kind}: {size}": why for r in records for size, why in r.failures.items()}
        return {
            "graphs": sum(map(len, self.all_graphs)),
            "graphs_failed": len(failures),
            "graph_failures": failures,
            "graph_replays": sum(r.replayed for r in records),
            **{f"graph_misses_{why.value}": sum(r.eager[why] for r in records) for why in Eager},
            **(slots.statistics() if slots is not None else {}),
        }

    def streaming_statistics(self) -> dict[str, int]:
        """Counters of blocks that are streamed; empty where none are."""
        return {} if self.block_stream is None else self.block_stream.statistics()

    @torch.inference_mode()
    def prepare(self, states: Sequence[DeviceState], steps: int = 1) -> bool:
        """Capture the graph that `step` would replay; the sequences stay as they are.

        Returns:
            Whether there is one now.
        """
        if self.graphs is None:
            return False
        batch = ForwardBatch.of(states)
        return self.graphs.prepare(batch, self.packs.get(batch.shapes), steps)

    def _replay(self, states: Sequence[DeviceState], steps: int) -> Tensor | None:
        """The same on a graph; None where none serves."""
        if self.graphs is None:
            return None
        batch = ForwardBatch.of(states)
        return self.graphs.step(batch, self.packs.get(batch.shapes), steps)

    def _run(self, states: Sequence[DeviceState]) -> Tensor:
        """One step without a graph."""
        forward = self.begin_step(states)
        forward.run(range(self.num_blocks))
        return forward.finish()

    def begin_step(self, states: Sequence[DeviceState]) -> PackForward:
        """The same, always eagerly, to be run in slices of blocks under `torch.inference_mode`."""
        return PackForward(self.dit, self.attention.eager.attend, self.packs, states)

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of a step."""
        return len(self.dit.blocks)

    @torch.inference_mode()
    def decode(self, state: DeviceState, tile: int | None = None) -> Tensor:
        """Pixels of a finished sequence: float32 [3, height, width] in [0, 1].

        Args:
            state: after its last step.
            tile: see `VAEDecoder.decode`; changes memory, not pixels.

        Raises:
            ModelError: there are NaNs or infinities in it.
        """
        *_, pixels = self.decode_slices(state, tile)
        assert pixels is not None
        if not torch.isfinite(pixels).all():
            raise not_finite("the picture")
        return pixels

    @torch.inference_mode()
    def decode_slices(self, state: DeviceState, tile: int | None = None) -> Iterator[Tensor | None]:
        """The same in slices, and unchecked: yields None after each but the last, then pixels."""
        latents = unpatchify(state.tokens, *state.grid)
        return self.vae.decode_slices(latents, tile)

    @torch.inference_mode()
    def predicted_latents(self, state: DeviceState) -> Tensor:
        """What the latents will be as far as the last step can tell: x0 = x - sigma * velocity.

        Small, for previews: averaged down to at most 32 x 32.

        Args:
            state: after at least one step by which somebody wanted previews.

        Returns:
            float32 [16, h, w], to be decoded like any.
        """
        if state.velocity is None:
            raise ValueError("a preview needs a step after `Sequence.wants_previews` is set")
        sigma = state.schedule.sigmas[state.step]
        clean = state.tokens - sigma * state.velocity
        latents = unpatchify(clean, *state.grid)
        height, width = latents.shape[1:]
        shrink = max(1.0, max(height, width) / PREVIEW_LATENTS)
        size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        return F.adaptive_avg_pool2d(latents, size)

    def _state(
        self, sequence: ImageSequence, contexts: Sequence[Tensor], adapters: AdapterSet
    ) -> DeviceState:
        image = sequence.image
        if len(contexts) != len(image.prompts):
            raise ValueError(
                f"contexts: of {len(image.prompts)} prompts with guidance {image.guidance:g}, "
                f"got {len(contexts)}"
            )
        shapes = branch_shapes(image, [len(context) for context in contexts])
        sequence.tokens = tuple(shape.tokens for shape in shapes)
        schedule = self.schedule(image.steps, image.width, image.height, image.mu)
        modulation = ScheduleModulation(
            schedule, self._modulations, partial(self._modulation, adapters), adapters.time_key
        )
        return DeviceState(sequence, tuple(contexts), shapes, schedule, modulation, adapters)

    @torch.inference_mode()
    def _modulation(self, adapters: AdapterSet, schedule: Schedule) -> Modulation:
        deltas = UniformDeltas.of(adapters) if adapters.time_key else None
        return self.dit.modulation(torch.tensor(schedule.timesteps), deltas)
