"""What the parts that run in one child share: the device, the models, and all findings so far."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from krea2_bench.gpu.models import (
    RELEASED,
    TINY,
    Architecture,
    quantized_copy,
    random_dit,
    random_text_encoder,
    random_vae,
)
from krea2_bench.gpu.rows import Findings
from krea2_bench.gpu.stand_ins import OFFSETS, repeated
from krea2_srt.kernels.operations import TRITON, Operations, default_operations
from krea2_srt.model.attention import FusedGateAttention
from krea2_srt.model.checkpoint import SamplingDefaults
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.quantization import SERVED
from krea2_srt.model.text_encoder import TextEncoder
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.runner.attention import AttentionChoice, choose_attention
from krea2_srt.runner.attention_backends import SDPA
from krea2_srt.runner.fused_mlp import with_fused_mlp
from krea2_srt.runner.graphs import Capture, CudaCapture
from krea2_srt.runner.memory_choices import MAX_GRAPH_TOKENS
from krea2_srt.runner.model_runner import STREAM_PRIORITY, Krea2Runner
from krea2_srt.runner.products import known_products, use_fastest_product
from krea2_srt.runner.prompt_encoder import PromptEncoder

FP8_ATTENTION = "fa3_fp8"

TEXT_TOKENS = 64
"""Tokens of all prompts: an image of 1024 x 1024 is then a sequence of 4160 tokens."""


@dataclass
class Context:
    """See the module. Models are made when a part first asks for them.

    Attributes:
        device: measured.
        smoke: whether this is a trial of the program, on a tiny model.
        findings: rows so far, of other children too.
    """

    device: torch.device
    smoke: bool
    findings: Findings = field(default_factory=Findings)
    _quantized: dict[str, Krea2Runner] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return TINY if self.smoke else RELEASED

    @property
    def config(self) -> Krea2Config:
        return self.architecture.dit

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """To repeat one measurement for."""
        return 0.01 if self.smoke else 1.0

    @property
    def l2_bytes(self) -> int:
        """Bytes of the device's cache; what is to come from memory must be larger than this."""
        if not self.on_gpu:
            return 0
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    @cached_property
    def operations(self) -> Operations:
        return default_operations(self.device)

    @cached_property
    def attention(self) -> AttentionChoice:
        """As a server chooses it in bf16, where it may gate what it writes."""
        if not self.on_gpu:
            return AttentionChoice(SDPA, OFFSETS)
        return choose_attention(self.device, self.dtype, fused_gate=self.operations is TRITON)

    @cached_property
    def plain_attention(self) -> AttentionChoice:
        """As a server chooses it in 8 bits, where quantisation takes the gate along."""
        chosen = self.attention
        some = [backend for backend in (chosen.eager, chosen.graph) if backend is not None]
        if not any(isinstance(backend.attend, FusedGateAttention) for backend in some):
            return chosen  # a second race would be of the same
        return choose_attention(self.device, self.dtype, fused_gate=False)

    def fp8_attention(self) -> AttentionChoice:
        """In 8 bits too, which a server takes only when it is told to.

        Raises:
            ConfigError: it does not run here; the message says why.
        """
        return choose_attention(self.device, self.dtype, FP8_ATTENTION)

    @cached_property
    def dit(self) -> Krea2DiT:
        dit = random_dit(self.config, self.device, self.dtype)
        dit.operations = self.operations
        return dit

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return random_text_encoder(self.architecture, self.device, self.dtype)

    @cached_property
    def vae(self) -> VAEDecoder:
        vae = random_vae(self.architecture.vae_dim, self.device, self.dtype)
        vae.use_kernels(self.operations is TRITON)
        return vae

    @cached_property
    def runner(self) -> Krea2Runner:
        """In bf16, with what a server chooses at its start; see `whole`."""
        if self.on_gpu:
            self.dit.operations = with_fused_mlp(self.dit, "auto")
        return self.runner_of(self.dit)

    def quantized_runner(self, format: str) -> Krea2Runner:
        """In one of `SERVED`, likewise; made when it is first asked for."""
        if format not in self._quantized:
            dit = quantized_copy(self.dit, SERVED[format])
            if self.on_gpu:
                use_fastest_product(dit, known_products())
                dit.operations = with_fused_mlp(dit, "auto")
            self._quantized[format] = self.runner_of(dit, self.plain_attention)
        return self._quantized[format]

    @cached_property
    def capture(self) -> Capture:
        """How steps are captured: all of a child's by one, as all of a server's are."""
        return CudaCapture(self.device, STREAM_PRIORITY) if self.on_gpu else repeated

    @cached_property
    def text_capture(self) -> Capture:
        """How prompts are captured, in memory of their own, as a server's are."""
        return CudaCapture(self.device, STREAM_PRIORITY) if self.on_gpu else repeated

    def runner_of(self, dit: Krea2DiT, attention: AttentionChoice | None = None) -> Krea2Runner:
        """One that steps: the other parts would take seconds to make."""
        parts: Any = None
        return Krea2Runner(dit, parts, parts, SamplingDefaults(True), attention or self.attention)

    def whole(self, runner: Krea2Runner) -> Krea2Runner:
        """The same with its text encoder and its VAE."""
        if runner.text_encoder is None:
            runner.text_encoder, runner.vae = self.text_encoder, self.vae
            runner.prompt_encoder = PromptEncoder(self.text_encoder, runner.dit, runner.attention)
        return runner

    def use_graphs(self, runner: Krea2Runner) -> bool:
        """Let a runner replay packs of any size, whichever a server would; whether it can."""
        if runner.attention.graph is None:
            return False
        if runner.graphs is None:
            tokens = 512 if self.smoke else MAX_GRAPH_TOKENS
            runner.use_graphs(self.capture, tokens)
        return True

    # Ceilings; None before they are measured.

    def step_floor_ms(self, branches: list[int], format: str = "bf16") -> float | None:
        """The least time of one step of a pack of sequences with so many tokens.

        Args:
            branches: tokens of each.
            format: of the blocks' matrices.
        """
        tflops = self.findings.get("ceilings", "matmul bf16")
        linear_tflops = self.findings.get("ceilings", f"matmul {format}")
        copy = self.findings.get("ceilings", "copy")
        if not tflops or not copy or not linear_tflops:
            return None
        linear, attention = step_flops(self.config, branches)
        weights = step_weight_bytes(self.config) * (2 if format == "bf16" else 1)
        ms = linear / linear_tflops / 1e9 + attention / tflops / 1e9
        return max(ms, weights / copy / 1e6)
