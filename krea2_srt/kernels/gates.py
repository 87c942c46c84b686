"""The two gates inside a block, each between two matrix multiplications.

sigmoid_gate:  out * sigmoid(gate)     of the attention's output
silu_mul:      silu(gate) * up         of the MLP, from its fused projection (gate, then up)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of
from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    Tokens,
    finish_tokens,
    largest_of,
    output_tokens,
    pieces_of,
    store_token,
)

_PIECE = 2048
"""Columns of a program where nothing needs the whole token."""


def sigmoid_gate(out: Tensor, gate: Tensor, format: TokenFormat | None = None) -> Tokens:
    """Gate the attention's output.

    Args:
        out: [T, width], contiguous.
        gate: [T, width]; its rows may lie apart.
        format: quantise the result.

    Returns:
        [T, width] in out's dtype, or quantised.
    """
    if format is None:
        return out * torch.sigmoid(gate)
    pieces = zip(pieces_of(out), pieces_of(gate), strict=True)
    gated = (out.float() * torch.sigmoid(gate.float()) for out, gate in pieces)
    return finish_tokens(gated, out, format)


def silu_mul(gate_up: Tensor, format: TokenFormat | None = None) -> Tokens:
    """SiLU of the first half of the columns, times the second half.

    Args:
        gate_up: [T, 2 * width], contiguous.
        format: quantise the result.

    Returns:
        [T, width] in gate_up's dtype, or quantised.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if format is None:
        return F.silu(gate) * up
    pieces = zip(pieces_of(gate), pieces_of(up), strict=True)
    gated = (F.silu(gate.float()).mul_(up) for gate, up in pieces)
    return finish_tokens(gated, gate, format)


@triton.jit
def _gate_kernel(
    gate_ptr,
    value_ptr,
    out_ptr,
    out_scale_ptr,
    gate_stride,
    value_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATION: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_ptr + token * gate_stride + columns, mask, 0.0).to(tl.float32)
    value = tl.load(value_ptr + token * value_stride + columns, mask, 0.0).to(tl.float32)
    x = value / (1.0 + tl.exp(-gate))
    if SILU:
        x = x * gate
    store_token(x, token, columns, mask, out_ptr, out_scale_ptr, WIDTH, BLOCK, LARGEST, ROTATION)


def _launch(
    kernel: str, gate: Tensor, value: Tensor, silu: bool, format: TokenFormat | None
) -> Tokens:
    num_tokens, width = value.shape
    assert gate.stride(1) == value.stride(1) == 1
    launch, _ = device_of(value.device).launch(f"{kernel}_8bit" if format else kernel, num_tokens)
    out, out_scale = output_tokens(value, width, format)
    block = triton.next_power_of_2(width)
    if format is None:
        block = min(block, _PIECE)
    _gate_kernel[(num_tokens, triton.cdiv(width, block))](
        gate,
        value,
        out,
        out_scale,
        gate.stride(0),
        value.stride(0),
        WIDTH=width,
        BLOCK=block,
        SILU=silu,
        LARGEST=largest_of(format),
        ROTATION=format.rotation if format else 0,
        num_warps=launch.num_warps,
    )
    return out if format is None else QuantizedTokens(out, out_scale)


def sigmoid_gate_triton(out: Tensor, gate: Tensor, format: TokenFormat | None = None) -> Tokens:
    """See `sigmoid_gate`."""
    return _launch("sigmoid_gate", gate, out, False, format)


def silu_mul_triton(gate_up: Tensor, format: TokenFormat | None = None) -> Tokens:
    """See `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _launch("silu_mul", gate, up, True, format)
