"""What all parts of the benchmark share: the device, the models, and the ceilings found so far."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.on_gpu.models import (
    RELEASED,
    TINY,
    Architecture,
    quantized_copy,
    random_dit,
    random_text_encoder,
    random_vae,
)
from benchmarks.on_gpu.rows import Findings
from krea2_srt.kernels.operations import TRITON, default_operations
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.quantization import Quantization
from krea2_srt.runner.attention import AttentionChoice, choose_attention
from krea2_srt.runner.checkpoint import Recipe
from krea2_srt.runner.graphs import Capture, CudaCapture
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.text_encoder import TextEncoder
from krea2_srt.runner.vae import VAEDecoder

TEXT_TOKENS = 64
"""Of all prompts: an image of 1024 x 1024 is then a sequence of 4160 tokens."""


@dataclass
class Context:
    """See the module.

    Attributes:
        device: measured.
        smoke: whether this is a trial of the program, on a tiny model.
        findings: rows so far.
    """

    device: torch.device
    smoke: bool
    findings: Findings = field(default_factory=Findings)

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
    def seconds(self) -> float:
        """To repeat one measurement for."""
        return 0.01 if self.smoke else 1.0

    @cached_property
    def attention(self) -> AttentionChoice:
        return choose_attention(self.device, self.dtype)

    @cached_property
    def dit(self) -> Krea2DiT:
        dit = random_dit(self.config, self.device, self.dtype)
        dit.operations = default_operations(self.device)
        return dit

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return random_text_encoder(self.architecture, self.device, self.dtype)

    @cached_property
    def vae(self) -> VAEDecoder:
        vae = random_vae(self.architecture.vae_dim, self.device, self.dtype)
        vae.use_kernels(self.dit.operations is TRITON)
        return vae

    @cached_property
    def runner(self) -> Krea2Runner:
        """In bf16, without graphs."""
        return self._runner(self.dit)

    @cached_property
    def fp8_runner(self) -> Krea2Runner:
        """In fp8, without graphs."""
        return self._runner(quantized_copy(self.dit, Quantization("fp8")))

    @cached_property
    def capture(self) -> Capture | None:
        """How graphs are captured, all into one pool; a trial without a GPU has none."""
        return CudaCapture(self.device) if self.device.type == "cuda" else None

    def _runner(self, dit: Krea2DiT) -> Krea2Runner:
        return Krea2Runner(dit, self.text_encoder, self.vae, Recipe(True), self.attention)

    # Ceilings; None before they are measured.

    def step_floor_ms(self, lanes: list[int], fp8: bool = False) -> float | None:
        """The least time of one step of a pack of sequences with so many tokens."""
        tflops = self.findings.get("ceilings", "matmul bf16")
        fp8_tflops = self.findings.get("ceilings", "matmul fp8") if fp8 else tflops
        copy = self.findings.get("ceilings", "copy")
        if not tflops or not copy or not fp8_tflops:
            return None
        linear, attention = step_flops(self.config, lanes)
        weights = step_weight_bytes(self.config) * (1 if fp8 else 2)
        ms = linear / fp8_tflops / 1e9 + attention / tflops / 1e9
        return max(ms, weights / copy / 1e6)


Part = Callable[[Context], None]
"""Measures something and appends its rows to the findings."""
