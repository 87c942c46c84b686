"""The kernels as one table, so that a model runs on either kind."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krea2_srt.kernels import euler, final_layer, gates, norm, qk_norm_rope
from krea2_srt.kernels.quantize import TokenFormat, Tokens
from krea2_srt.kernels.token_rows import TokenRows


class NormScaleShift(Protocol):
    def __call__(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        rows: TokenRows,
        eps: float,
        format: TokenFormat | None = None,
    ) -> Tokens: ...


class AddGated(Protocol):
    def __call__(self, x: Tensor, gate: Tensor, branch: Tensor, rows: TokenRows) -> Tensor: ...


class AddGatedNorm(Protocol):
    def __call__(
        self,
        x: Tensor,
        gate: Tensor,
        branch: Tensor,
        scale: Tensor,
        shift: Tensor,
        rows: TokenRows,
        eps: float,
        format: TokenFormat | None = None,
    ) -> Tokens: ...


class QKNormRope(Protocol):
    def __call__(
        self,
        projection: Tensor,
        q_scale: Tensor,
        k_scale: Tensor,
        rope: Tensor | None,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> None: ...


class SigmoidGate(Protocol):
    def __call__(self, out: Tensor, gate: Tensor, format: TokenFormat | None = None) -> Tokens: ...


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor, format: TokenFormat | None = None) -> Tokens: ...


class FinalLayer(Protocol):
    def __call__(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        rows: TokenRows,
        eps: float,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor: ...


class EulerStep(Protocol):
    def __call__(
        self,
        tokens: Tensor,
        velocity: Tensor,
        row: Tensor,
        partner: Tensor,
        dt: Tensor,
        guidance: Tensor,
        guided: Tensor,
        broken: Tensor,
    ) -> None: ...


@dataclass(frozen=True)
class Operations:
    """What lies between the matrix multiplications; see the functions of the same names."""

    name: str
    norm_scale_shift: NormScaleShift
    add_gated: AddGated
    add_gated_norm: AddGatedNorm
    qk_norm_rope: QKNormRope
    sigmoid_gate: SigmoidGate
    silu_mul: SiluMul
    final_layer: FinalLayer
    euler_step: EulerStep


TORCH = Operations(
    "torch",
    norm.norm_scale_shift,
    norm.add_gated,
    norm.add_gated_norm,
    qk_norm_rope.qk_norm_rope,
    gates.sigmoid_gate,
    gates.silu_mul,
    final_layer.final_layer,
    euler.euler_step,
)
"""On any device."""

TRITON = Operations(
    "triton",
    norm.norm_scale_shift_triton,
    norm.add_gated_triton,
    norm.add_gated_norm_triton,
    qk_norm_rope.qk_norm_rope_triton,
    gates.sigmoid_gate_triton,
    gates.silu_mul_triton,
    final_layer.final_layer_triton,
    euler.euler_step_triton,
)
"""On NVIDIA GPUs; they quantise to fp8 only."""


def default_operations(device: torch.device) -> Operations:
    """The fastest that runs on a device."""
    return TRITON if device.type == "cuda" else TORCH
