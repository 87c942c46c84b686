"""The kernels as one table, so that a model runs on either kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from krea2_srt.kernels import euler, final_layer, gates, lora, norm, products, qk_norm_rope
from krea2_srt.kernels.quantize import Tokens


@dataclass(frozen=True)
class Operations:
    """What lies between the matrix multiplications, one that does more than multiply, and those of
    adapters; see the functions of the same names, whose signatures both kinds have.

    Attributes:
        fused_mlp_tokens: of a pack from which on the MLP's first product is `swiglu_product`,
            rather than a plain one and `silu_mul`.
    """

    name: str
    norm_scale_shift: Callable[..., Tokens]
    add_gated: Callable[..., Tensor]
    add_gated_norm: Callable[..., Tokens]
    qk_norm_rope: Callable[..., None]
    sigmoid_gate: Callable[..., Tokens]
    silu_mul: Callable[..., Tokens]
    swiglu_product: Callable[..., Tokens]
    final_layer: Callable[..., Tensor]
    euler_step: Callable[..., None]
    lora_shrink: Callable[..., Tensor]
    lora_expand: Callable[..., None]
    fused_mlp_tokens: float = math.inf


TORCH = Operations(
    "torch",
    norm.norm_scale_shift,
    norm.add_gated,
    norm.add_gated_norm,
    qk_norm_rope.qk_norm_rope,
    gates.sigmoid_gate,
    gates.silu_mul,
    products.swiglu_product,
    final_layer.final_layer,
    euler.euler_step,
    lora.lora_shrink,
    lora.lora_expand,
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
    products.swiglu_product_triton,
    final_layer.final_layer_triton,
    euler.euler_step_triton,
    lora.lora_shrink_triton,
    lora.lora_expand_triton,
)
"""On NVIDIA GPUs."""


def default_operations(device: torch.device) -> Operations:
    """The fastest that runs on a device."""
    return TRITON if device.type == "cuda" else TORCH
