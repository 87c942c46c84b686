"""From a checkpoint and settings to a runner that serves: what fits, what is fastest, warmed up."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import roofline
from krea2_srt.errors import AdapterError, ConfigError, first_line
from krea2_srt.host_memory import available_memory
from krea2_srt.kernels.operations import TORCH, TRITON, Operations, default_operations
from krea2_srt.kernels.products import ScaledProduct
from krea2_srt.lora.adapter import check_different
from krea2_srt.lora.library import AdapterLibrary
from krea2_srt.lora.merge import merge
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.rounding import Rounding
from krea2_srt.lora.scaled_files import ScaledFile, is_folder, scaled_files
from krea2_srt.lora.slots import NUM_SLOTS, RANKS, AdapterSlots, largest_rank, slot_bytes
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import dit_config
from krea2_srt.model.on_disk import part_files
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.weights import WeightDelta
from krea2_srt.read_ahead import begin, finish
from krea2_srt.runner.allocator import use_expandable_segments
from krea2_srt.runner.attention import AttentionBackend, choose_attention
from krea2_srt.runner.caches import CacheBytes
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.runner.fused_mlp import check_fused_mlp, with_fused_mlp
from krea2_srt.runner.gpu import Gpu, check_capability
from krea2_srt.runner.graphs import CudaCapture
from krea2_srt.runner.memory_choices import MAX_GRAPH_TOKENS, MemoryRequest
from krea2_srt.runner.memory_plan import MemoryPlan, plan_memory
from krea2_srt.runner.memory_sizes import GIB, PartSizes
from krea2_srt.runner.model_runner import STREAM_PRIORITY, Krea2Runner
from krea2_srt.runner.part_sizes import checkpoint_sizes, on_gpu
from krea2_srt.runner.products import known_products, product_candidates, use_fastest_product
from krea2_srt.runner.streamed_blocks import streamed_positions
from krea2_srt.runner.warm_up import warm_up
from krea2_srt.start_up import StartUp, process_age_s

logger = logging.getLogger(__name__)

MAX_LOST = 0.2
"""The share of merged adapters that may be lost without a warning."""

HOST_MARGIN = GIB
"""Bytes of host memory that pinned weights leave to all else."""


def host_memory_to_take() -> int:
    """Bytes of host memory that weights may be pinned in."""
    return max(0, available_memory() - HOST_MARGIN)


@dataclass(frozen=True)
class RunnerBuilder:
    """What to load, and how.

    Attributes:
        checkpoint: where the parts lie.
        device: where they run.
        dtype, text_dtype, vae_dtype: of the DiT, the text encoder and the VAE.
        quantization: of the DiT's blocks.
        config: settings.
        caches: bounds of what is remembered, which a small GPU may cut.
        engine: limits of what the runner will be asked for.
        merged: adapters that are added to the DiT's weights, beside those of the settings.
    """

    checkpoint: Krea2Checkpoint
    device: torch.device
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    quantization: Quantization | None = None
    config: RunnerConfig = RunnerConfig()
    caches: CacheBytes = CacheBytes()
    engine: EngineConfig = EngineConfig()
    merged: tuple[ScaledFile, ...] = ()

    def plan(self) -> MemoryPlan | None:
        """How the GPU's memory is used; None on a CPU, where all stays where it is.

        Raises:
            ConfigError: the model does not fit, or the device does not have what is asked for.
            CheckpointError: its configs are missing or damaged.
        """
        if self.device.type != "cuda":
            if self.config.cuda_graphs == "on":
                raise ConfigError(f"cuda_graphs: there are none on {self.device}")
            if self.config.streamed_count:
                raise ConfigError(f"streamed_blocks: none are streamed on {self.device}")
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        gpu = Gpu(free, total, torch.cuda.get_device_capability(self.device))
        return self.plan_for(gpu, host_memory_to_take())

    def plan_for(
        self, gpu: Gpu, host_bytes: int | None = None, sizes: PartSizes | None = None
    ) -> MemoryPlan:
        """How the memory of a GPU would be used, which need not be at hand.

        Args:
            host_bytes: of host memory that may be taken; None is any.
            sizes: what `sizes` has said.

        Raises:
            ConfigError, CheckpointError: see `plan`.
        """
        if self.quantization is not None:
            check_capability(self.quantization.format, gpu.capability)
        free = gpu.free
        if self.config.gpu_memory_gib:
            free = min(free, int(self.config.gpu_memory_gib * GIB))
        sizes = on_gpu(sizes or self.sizes(), gpu)
        return plan_memory(free, gpu.total, sizes, self._request(host_bytes))

    def sizes(self) -> PartSizes:
        """Bytes of the parts, on whatever GPU.

        Raises:
            CheckpointError: their configs are missing or damaged.
        """
        return checkpoint_sizes(
            self.checkpoint, self.dtype, self.text_dtype, self.vae_dtype, self.quantization
        )

    def _request(self, host_bytes: int | None) -> MemoryRequest:
        limits, sampling = self.engine.limits, self.checkpoint.sampling
        adapters = int(self.config.lora_memory_gib * GIB) if self.config.lora_dir else 0
        streamed = self.config.streamed_count
        if self.config.cuda_graphs == "on":
            if streamed:
                raise ConfigError(
                    f"streamed_blocks: {streamed} blocks cannot be streamed with cuda_graphs on, "
                    "which needs them where they are"
                )
            streamed = 0
        return MemoryRequest(
            max_pack_tokens=self.engine.max_pack_tokens,
            max_image_tokens=min(limits.max_pixels, limits.max_side**2) // 256,
            max_paused_steps=self.engine.max_paused_steps,
            max_sequences=self.engine.max_active_sequences,
            max_pack_sequences=self.engine.max_pack_sequences,
            branches_per_sequence=1 if sampling.distilled else 2,
            schedule_steps=sampling.default_steps,
            cache_bytes=self.caches.total,
            adapter_bytes=adapters,
            slot_bytes=adapters,
            text_encoder=self.config.text_encoder,
            max_graph_tokens=self.config.max_graph_tokens or self._graph_tokens(),
            graphs=self.config.cuda_graphs != "off",
            needs_graphs=self.config.cuda_graphs == "on",
            streamed_blocks=streamed,
            host_bytes=host_bytes,
        )

    def _graph_tokens(self) -> int:
        """The most that a graph is ever asked for: packs are held to a turn, and steps of larger
        images are cut into slices, which are launched one by one.

        By the tokens alone, at an H200's rate: it is less where images are large, or the GPU is
        slower. On a faster one, larger packs run without: they take so long that graphs save
        nothing.
        """
        twice = 2 if self.quantization is not None else 1
        per_token_ms = roofline().per_token / twice
        return min(MAX_GRAPH_TOKENS, int(self.engine.max_turn_ms / per_token_ms))

    def within(self, plan: MemoryPlan | None) -> EngineConfig:
        """The engine's limits, with those that the plan cuts."""
        if plan is None:
            return self.engine
        return replace(
            self.engine,
            max_pack_tokens=plan.max_pack_tokens,
            max_pack_sequences=plan.max_pack_sequences,
            max_active_sequences=plan.max_sequences,
            max_pixels=min(self.engine.max_pixels, plan.max_image_tokens * 256),
        )

    def load(
        self,
        plan: MemoryPlan | None,
        backends: Mapping[str, AttentionBackend] | None = None,
        products: Mapping[str, ScaledProduct] = MappingProxyType({}),
    ) -> Krea2Runner:
        """Load the parts and make them fast.

        Args:
            plan: from `plan`.
            backends: of attention, by name, to choose from.
            products: by name, to choose from beside ours.

        Raises:
            ConfigError: a setting asks for what the device does not have.
            CheckpointError: something is missing, damaged or does not fit together.
            AdapterError: one that is to be merged cannot be read, or is another model's.
        """
        rounding = Rounding(self.dtype)
        deltas = self._deltas(rounding)
        use_expandable_segments(self.device)
        operations = self._operations()
        check_fused_mlp(self.config.fused_mlp, operations)
        candidates = product_candidates(
            self.config.products,
            self.device,
            self.quantization,
            known_products(triton=operations is TRITON) | dict(products),
        )
        attention = choose_attention(
            self.device,
            self.dtype,
            self.config.attention,
            backends,
            fused_gate=operations is TRITON and self.quantization is None,
        )
        streamed = self._streamed_blocks(plan)
        resident = self.config.text_encoder != "offload"
        imported_s = process_age_s()
        # Under way already, where the process knew its checkpoint before it imported torch.
        begin(part_files({part: getattr(self.checkpoint, part) for part in WEIGHTS}))
        try:
            runner = Krea2Runner.load(
                self.checkpoint,
                self.device,
                self.dtype,
                text_dtype=self.text_dtype,
                vae_dtype=self.vae_dtype,
                quantization=self.quantization,
                deltas=deltas,
                attention=attention,
                text_encoder_resident=plan.text_encoder_resident if plan else resident,
                streamed_blocks=streamed,
                caches=self.caches.scaled(plan.cache_share) if plan else self.caches,
            )
        finally:
            ahead = finish()
        runner.start_up = StartUp(imported_s, process_age_s(), ahead)
        if deltas:
            level = logging.WARNING if rounding.lost > MAX_LOST else logging.INFO
            text = "krea2-srt: %.0f%% of what was merged is lost in the rounding of the weights"
            logger.log(level, text, 100 * rounding.lost)
        runner.adapters = AdapterPool(
            runner.dit,
            int(self.config.lora_memory_gib * GIB),
            int(self.config.lora_host_gib * GIB),
        )
        runner.dit.operations = operations
        # Should all blocks be streamed, those of one are at hand to be tried.
        with runner.dit.on_device(_most_quantized(runner.dit, streamed)):
            use_fastest_product(runner.dit, candidates)
            runner.dit.operations = with_fused_mlp(runner.dit, self.config.fused_mlp)
        if plan is None:
            return runner
        logger.info("krea2-srt: memory of %s:\n%s", self.device, plan.report())
        runner.prompt_encoder.prompts_at_once = plan.max_encoded_prompts
        runner.vae.use_kernels(operations is TRITON)
        if streamed:
            text = "krea2-srt: no CUDA graphs: %d of %d blocks are streamed from host memory"
            logger.info(text, len(streamed), runner.num_blocks)
        elif plan.max_graph_tokens:
            self._use_graphs(runner, plan)
        if self.config.warm_up_s:
            race = self.config.cuda_graphs == "auto" and not self.config.max_graph_tokens
            with runner.on_stream():
                warm_up(runner, self.config.warm_up_s, race=race)
        return runner

    def _streamed_blocks(self, plan: MemoryPlan | None) -> tuple[int, ...]:
        """Numbers of the blocks that come from host memory as they run; none on a CPU."""
        if plan is None or not plan.streamed_blocks:
            return ()
        if self.config.cuda_graphs == "on":
            raise ConfigError(
                f"cuda_graphs: on needs all blocks on the GPU, {plan.streamed_blocks} are streamed "
                f"from host memory; auto runs without graphs"
            )
        return streamed_positions(
            dit_config(self.checkpoint.transformer).num_layers, plan.streamed_blocks
        )

    def lora_folder(self) -> Path | None:
        """The folder of the adapters that requests may name; None where the settings have none.

        Raises:
            ConfigError: it is not there.
        """
        if not self.config.lora_dir:
            return None
        folder = Path(self.config.lora_dir).expanduser()
        if not is_folder(folder):
            raise ConfigError(f"lora_dir: there is no folder {folder}")
        return folder

    def adapter_library(self, runner: Krea2Runner) -> AdapterLibrary | None:
        """What serves the adapters of the settings' folder; None where there is none.

        Raises:
            ConfigError: the folder is not there.
        """
        folder = self.lora_folder()
        if folder is None:
            return None
        logger.info("krea2-srt: serves the adapters in %s", folder)
        return AdapterLibrary(folder, runner.adapters, runner.dit)

    def _deltas(self, rounding: Rounding) -> dict[str, WeightDelta]:
        """What the adapters that are merged add."""
        files = (*scaled_files("lora_merge", self.config.lora_merge), *self.merged)
        if not files:
            return {}
        config = dit_config(self.checkpoint.transformer)
        try:
            adapters = [read_adapter(f.path, config, alpha=f.alpha) for f in files]
            check_different(zip((f.path for f in files), adapters, strict=True))
        except AdapterError as error:
            raise AdapterError(f"to be merged: {error}") from None
        for file, adapter in zip(files, adapters, strict=True):
            logger.info("krea2-srt: merges %s at %g (%s)", adapter.name, file.scale, adapter.digest)
        scales = (file.scale for file in files)
        return merge(zip(adapters, scales, strict=True), config, rounding)

    def _operations(self) -> Operations:
        if self.config.kernels == "triton" and self.device.type != "cuda":
            raise ConfigError(f"kernels: triton does not run on {self.device}")
        if self.config.kernels == "torch":
            return TORCH
        return default_operations(self.device)

    def _use_graphs(self, runner: Krea2Runner, plan: MemoryPlan) -> None:
        if runner.attention.graph is None:
            if self.config.cuda_graphs == "on":
                raise ConfigError(
                    f"cuda_graphs: attention {runner.attention.name} cannot be captured"
                )
            logger.info("krea2-srt: no CUDA graphs: no attention back end can be captured")
            return
        runner.use_graphs(
            CudaCapture(self.device, STREAM_PRIORITY),
            int(min(plan.max_graph_tokens, runner.attention.max_graph_tokens)),
            plan.max_graphs,
            self._adapter_slots(runner.dit),
        )
        if plan.text_encoder_resident:
            runner.use_text_graphs(CudaCapture(self.device, STREAM_PRIORITY))

    def _adapter_slots(self, dit: Krea2DiT) -> AdapterSlots | None:
        """Slots for graphs with adapters, as large as the settings allow; None without."""
        if not self.config.lora_dir or dit.operations.name != "triton":
            return None
        rank = largest_rank(dit, NUM_SLOTS, int(self.config.lora_memory_gib * GIB))
        if rank is None:
            needed = NUM_SLOTS * slot_bytes(dit, RANKS[0]) / GIB
            text = "krea2-srt: no CUDA graphs with adapters: lora_memory_gib is less than %.2f"
            logger.info(text, needed)
            return None
        try:
            slots = AdapterSlots(dit, rank)
        except torch.OutOfMemoryError as error:
            # Packs with adapters run without graphs, and need no more than before.
            logger.warning("krea2-srt: no CUDA graphs with adapters: %s", first_line(error))
            return None
        text = "krea2-srt: CUDA graphs with adapters of ranks up to %d, %d at a time, %.2f GiB"
        logger.info(text, rank, NUM_SLOTS, slots.nbytes / GIB)
        return slots


def _most_quantized(dit: Krea2DiT, blocks: Sequence[int]) -> int:
    """The block of some with the most matrices in 8 bits: others may keep theirs as they are."""
    return max(
        blocks, default=0, key=lambda i: sum(m.format is not None for m in dit.blocks[i].linears)
    )
