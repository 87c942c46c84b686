"""Gated residual, RMSNorm, scale and shift: what lies between two matrix multiplications.

    x <- x + gate[row] * update                         in place, in x's dtype
    h  = x / sqrt(mean(x^2) + eps) * scale[row] + shift[row]       in float32

`norm_scale_shift` is the second line, `add_gated` the first, and `add_gated_norm` both, with x
read and written once. ``scale`` holds the norm's own weight, multiplied in.
"""

from collections.abc import Iterator

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
from krea2_srt.kernels.segment_index import SegmentIndex


def norm_scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    format: TokenFormat | None = None,
) -> Tokens:
    """RMSNorm, scale and shift of a pack.

    Args:
        x: [T, width].
        scale, shift: float32 [rows, width].
        rows: which of them each token reads.
        eps: of the norm.
        format: quantise the result.

    Returns:
        [T, width] in x's dtype, or quantised.
    """
    return finish_tokens(_normed(x, scale, shift, rows, eps), x, format)


def _normed(
    x: Tensor, scale: Tensor, shift: Tensor, rows: SegmentIndex, eps: float
) -> Iterator[Tensor]:
    """`norm_scale_shift` in float32, piece by piece."""
    if rows.spans is None:
        out = F.rms_norm(x.float(), scale.shape[1:], None, eps)
        yield out.mul_(rows.of_tokens(scale)).add_(rows.of_tokens(shift))
        return
    # Span by span: no table of T rows, and each span's row stays in a CPU's cache.
    for start, end, row in rows.spans:
        for piece in pieces_of(x[start:end]):
            yield F.rms_norm(piece.float(), scale.shape[1:], scale[row], eps).add_(shift[row])


def add_gated(x: Tensor, gate: Tensor, update: Tensor, rows: SegmentIndex) -> Tensor:
    """``x + gate * update`` in place.

    Args:
        x, update: [T, width].
        gate: [rows, width] in x's dtype.
        rows: which row each token reads.
    """
    if rows.spans is None:
        return x.addcmul_(rows.of_tokens(gate), update)
    for start, end, row in rows.spans:
        x[start:end].addcmul_(gate[row], update[start:end])
    return x


def add_gated_norm(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    format: TokenFormat | None = None,
) -> Tokens:
    """`add_gated` on x, in place, then `norm_scale_shift` of it, which is returned."""
    return norm_scale_shift(add_gated(x, gate, update, rows), scale, shift, rows, eps, format)


# Not specialised: a new number of tokens must not compile a new kernel while requests wait.
@triton.jit(do_not_specialize=["num_tokens", "tokens_per_program"])
def _norm_kernel(
    x_ptr,
    gate_ptr,
    update_ptr,
    scale_ptr,
    shift_ptr,
    row_ptr,
    out_ptr,
    out_scale_ptr,
    num_tokens,
    tokens_per_program,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATION: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    first = tl.program_id(0) * tokens_per_program
    # The rows of the first token stay in registers until a token of another sequence comes.
    row = tl.load(row_ptr + first)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask, 0.0).to(tl.float32)
    if NORM:
        scale = tl.load(scale_ptr + row * scale_stride + columns, mask, 0.0)
        shift = tl.load(shift_ptr + row * shift_stride + columns, mask, 0.0)
    for i in range(tokens_per_program):
        token = first + i
        if token < num_tokens:
            token_row = tl.load(row_ptr + token)
            if token_row != row:
                row = token_row
                if GATED:
                    gate = tl.load(gate_ptr + row * gate_stride + columns, mask, 0.0).to(tl.float32)
                if NORM:
                    scale = tl.load(scale_ptr + row * scale_stride + columns, mask, 0.0)
                    shift = tl.load(shift_ptr + row * shift_stride + columns, mask, 0.0)
            at = token.to(tl.int64) * WIDTH + columns
            x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
            if GATED:
                x += gate * tl.load(update_ptr + at, mask, 0.0).to(tl.float32)
                # Rounded before the norm too: a step in slices reads it from memory there.
                stored = x.to(x_ptr.dtype.element_ty)
                tl.store(x_ptr + at, stored, mask)
                x = stored.to(tl.float32)
            if NORM:
                x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * scale + shift
                store_token(
                    x,
                    token,
                    columns,
                    mask,
                    out_ptr,
                    out_scale_ptr,
                    WIDTH,
                    BLOCK,
                    LARGEST,
                    ROTATION,
                )


def _launch(
    x: Tensor,
    gated: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, Tensor, float] | None,
    rows: SegmentIndex,
    format: TokenFormat | None,
) -> Tokens:
    num_tokens, width = x.shape
    assert x.is_contiguous()
    launch, tokens = device_of(x.device).launch("norm_8bit" if format else "norm", num_tokens)
    gate, update = gated or (x, x)
    assert update.is_contiguous()
    scale, shift, eps = norm or (x, x, 0.0)
    out, out_scale = output_tokens(x, width, format)
    _norm_kernel[(triton.cdiv(num_tokens, tokens),)](
        x,
        gate,
        update,
        scale,
        shift,
        rows.index,
        out,
        out_scale,
        num_tokens,
        tokens,
        gate.stride(0),
        scale.stride(0),
        shift.stride(0),
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        GATED=gated is not None,
        NORM=norm is not None,
        LARGEST=largest_of(format),
        ROTATION=format.rotation if format else 0,
        num_warps=launch.num_warps,
    )
    return out if format is None else QuantizedTokens(out, out_scale)


def norm_scale_shift_triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    format: TokenFormat | None = None,
) -> Tokens:
    """See `norm_scale_shift`."""
    return _launch(x, None, (scale, shift, eps), rows, format)


def add_gated_triton(x: Tensor, gate: Tensor, update: Tensor, rows: SegmentIndex) -> Tensor:
    """See `add_gated`."""
    _launch(x, (gate, update), None, rows, None)
    return x


def add_gated_norm_triton(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: SegmentIndex,
    eps: float,
    format: TokenFormat | None = None,
) -> Tokens:
    """See `add_gated_norm`."""
    return _launch(x, (gate, update), (scale, shift, eps), rows, format)
