"""Matrix products that finish what they multiply: scales and SwiGLU in their epilogue.

    scaled_product:   (x W^T) * x_scale * w_scale                      in 8 bits
    swiglu_product:   silu(x G^T) * (x U^T)      W = gate's rows, then up's; in 16 or in 8 bits

Sums, scales and SiLU are in float32, and only the result is rounded. Sums of int8 are whole numbers
in int32, exact: a product of two is 2^14 at most, so that they fit up to a width of 131,071, of
which the model has 16,384. The product of a plain matrix
multiplication is rounded before its SiLU, so that this one is the nearer to exact, by as much as
bf16's rounding. Bytes per hidden column of a token that pass through memory from the sums to what
the down product reads, with 2 of a column in bf16:

    a product, then silu_mul              4 + 4 + 2 = 10;  in 8 bits  4 + 4 + 1 = 9
    swiglu_product                        2;               in 8 bits  2 + 2 + 1 = 5

The 8-bit result has its token's scale, which no program knows before all columns of the token are
there: a second kernel reads the 16-bit result once and quantises it. It finds the largest element
itself, since it holds a whole token; handing that on from the product would save no byte.

A program's tile holds gate and up in turn, column by column: both halves of an element lie in
one thread, and one wide instruction of the tensor cores multiplies both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from krea2_srt.kernels.quantize import (
    QuantizedTokens,
    TokenFormat,
    Tokens,
    quantize_tokens,
    quantize_tokens_triton,
)

_INT8_TOKENS, _INT8_COLUMNS = 512, 4096
"""Most that torch's int8 kernel multiplies at a time."""

INT8_SUMS_BYTES = 8 * _INT8_TOKENS * _INT8_COLUMNS
"""Bytes of its sums, as whole numbers and in float32, beside the result."""

_FEWEST_INT8_TOKENS = 17
"""Fewest that it takes on CUDA."""

_MAX_WIDTH = 2**17 - 1
"""Widest sum of products of int8 that int32 holds, even of nothing but -128 times -128."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut among programs.

    Attributes:
        tokens, columns: of a program's sums.
        depth_bytes: of a row of either matrix that it loads at a time.
        group: tiles of tokens whose programs run side by side, and share what the L2 cache has.
        num_warps: of a program.
        num_stages: loads under way.
        tma: load by the tensor memory accelerator, which Hopper brought.
    """

    tokens: int = 128
    columns: int = 128
    depth_bytes: int = 128
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = False


SMALL = Tiles()
"""64 KiB of shared memory, which every GPU since Ampere has."""

LARGE = Tiles(columns=256, num_stages=4, tma=True)
"""192 KiB."""

TILES = {(9, 0): LARGE, (10, 0): LARGE, (10, 3): LARGE}
"""By compute capability; `SMALL` elsewhere."""


@cache
def tiles_of(device: torch.device) -> Tiles:
    """Those of a device."""
    if device.type != "cuda":  # the interpreter
        return SMALL
    return TILES.get(torch.cuda.get_device_capability(device), SMALL)


def scaled_product(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiply in 8 bits.

    Args:
        x: [T, width].
        weight: [columns, width] in x's format, contiguous.
        weight_scale: float32 [columns, 1].
        dtype: of the result.

    Returns:
        [T, columns].
    """
    return _float_product(x, weight, weight_scale).to(dtype)


ScaledProduct = Callable[[QuantizedTokens, Tensor, Tensor, torch.dtype], Tensor]
"""`scaled_product`, or what takes its place."""


def scaled_product_torch(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` by torch's kernels for CUDA; of int8 the columns are a multiple of 8."""
    if x.values.dtype is torch.int8:
        return _int8_product_torch(x, weight, weight_scale, dtype)
    # Sums in the tensor cores' own 14 bits of accumulator: what that loses is far below what
    # e4m3's 3 bits have lost already, and the other way is slower.
    return torch._scaled_mm(
        x.values,
        weight.t(),
        scale_a=x.scale,
        scale_b=weight_scale.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _int8_product_torch(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    # Its sums come without their scales, in 4 bytes each: of some of the result at a time, or they
    # would take twice as much memory as all of it.
    out = x.scale.new_empty(len(x), len(weight), dtype=dtype)
    pieces = triton.cdiv(len(x), _INT8_TOKENS)
    for values, scale, place in zip(
        *(tensor.tensor_split(pieces) for tensor in (x.values, x.scale, out)), strict=True
    ):
        padding = max(0, _FEWEST_INT8_TOKENS - len(values))
        padded = F.pad(values, (0, 0, 0, padding)) if padding else values
        for start in range(0, len(weight), _INT8_COLUMNS):
            columns = slice(start, start + _INT8_COLUMNS)
            sums = torch._int_mm(padded, weight[columns].t())[: len(values)]
            place[:, columns] = (sums * scale).mul_(weight_scale[columns].t())
            del sums  # or it would live while the next ones are made
    return out


def swiglu_product(
    x: Tokens,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    format: TokenFormat | None = None,
) -> Tokens:
    """SiLU of a product with the first half of a matrix' rows, times that with the second half.

    Args:
        x: [T, width].
        weight: [2 * columns, width] in x's dtype or format, contiguous.
        weight_scale: float32 [2 * columns, 1] of an 8-bit weight; None of another.
        dtype: of the result.
        format: quantise the result, after it is rounded to ``dtype``.

    Returns:
        [T, columns], or quantised.
    """
    gate, up = _float_product(x, weight, weight_scale).chunk(2, dim=-1)
    out = (F.silu(gate) * up).to(dtype)
    return out if format is None else quantize_tokens(out, format)


def _float_product(x: Tokens, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    if weight_scale is None:
        assert isinstance(x, Tensor)
        return x.float() @ weight.float().t()
    assert isinstance(x, QuantizedTokens)
    return (x.values.float() @ weight.float().t()) * x.scale * weight_scale.t()


@triton.jit(do_not_specialize=["num_tokens"])
def _product_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    num_tokens,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCALED: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    halves: tl.constexpr = 2 if SWIGLU else 1
    tile: tl.constexpr = COLUMNS // halves
    column_tiles: tl.constexpr = (OUT + tile - 1) // tile
    # Programs with neighbouring numbers share tokens and columns.
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(tl.cdiv(num_tokens, TOKENS) - first, GROUP)
    within = program % (GROUP * column_tiles)
    token_start = (first + within % height) * TOKENS
    column_start = within // height * tile

    # Beyond the last one: its neighbour's again, which are not stored.
    token = tl.minimum(token_start + tl.arange(0, TOKENS), num_tokens - 1)
    turn = tl.arange(0, COLUMNS)
    row = tl.minimum(column_start + turn // halves, OUT - 1) + turn % halves * OUT
    # Whole numbers are summed as such; Triton 3.6 has to be told at the product too.
    sums: tl.constexpr = tl.int32 if INT8 else tl.float32
    found = tl.zeros((TOKENS, COLUMNS), sums)
    if TMA:
        for start in range(0, WIDTH, DEPTH):
            x = x_ptr.load([token_start, start])
            if SWIGLU:
                weight = weight_ptr.load([column_start, 0, start]).reshape(COLUMNS, DEPTH)
            else:
                weight = weight_ptr.load([column_start, start])
            found = tl.dot(x, weight.T, found, "ieee", out_dtype=sums)
    else:
        depth = tl.arange(0, DEPTH)
        x_at = x_ptr + token.to(tl.int64)[:, None] * WIDTH + depth[None, :]
        weight_at = weight_ptr + row.to(tl.int64)[:, None] * WIDTH + depth[None, :]
        for start in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                x = tl.load(x_at + start)
                weight = tl.load(weight_at + start)
            else:
                inside = (start + depth < WIDTH)[None, :]
                x = tl.load(x_at + start, inside, 0.0)
                weight = tl.load(weight_at + start, inside, 0.0)
            found = tl.dot(x, weight.T, found, "ieee", out_dtype=sums)
    found = found.to(tl.float32)
    if SCALED:
        found *= tl.load(x_scale_ptr + token)[:, None]
        found *= tl.load(weight_scale_ptr + row)[None, :]
    if SWIGLU:
        gate, up = tl.split(tl.reshape(found, (TOKENS, tile, halves)))
        found = gate / (1.0 + tl.exp(-gate)) * up
    token = token_start + tl.arange(0, TOKENS)
    column = column_start + tl.arange(0, tile)
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * OUT + column[None, :],
        found.to(out_ptr.dtype.element_ty),
        (token < num_tokens)[:, None] & (column < OUT)[None, :],
    )


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    swiglu: bool,
) -> Tensor:
    num_tokens, width = x.shape
    halves = 2 if swiglu else 1
    columns = len(weight) // halves
    assert x.dtype is weight.dtype
    assert width <= _MAX_WIDTH
    assert x.is_contiguous()
    assert weight.is_contiguous()
    tiles = tiles_of(x.device)
    depth = tiles.depth_bytes // x.element_size()
    out = torch.empty(num_tokens, columns, dtype=dtype, device=x.device)
    matrices: tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor] = (x, weight)
    if tiles.tma:
        # Gate's and up's rows in turn, with no copy: a view with an axis of two halves.
        shape, strides = [columns, width], [width, 1]
        block = [tiles.columns, depth]
        if swiglu:
            shape, strides = [columns, 2, width], [width, columns * width, 1]
            block = [tiles.columns // 2, 2, depth]
        matrices = (
            TensorDescriptor(x, [num_tokens, width], [width, 1], [tiles.tokens, depth]),
            TensorDescriptor(weight, shape, strides, block),
        )
    token_tiles = triton.cdiv(num_tokens, tiles.tokens)
    _product_kernel[(token_tiles * triton.cdiv(columns * halves, tiles.columns),)](
        matrices[0],
        out if x_scale is None else x_scale,
        matrices[1],
        out if weight_scale is None else weight_scale,
        out,
        num_tokens,
        WIDTH=width,
        OUT=columns,
        SWIGLU=swiglu,
        SCALED=weight_scale is not None,
        INT8=x.dtype is torch.int8,
        TMA=tiles.tma,
        TOKENS=tiles.tokens,
        COLUMNS=tiles.columns,
        DEPTH=depth,
        GROUP=tiles.group,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def scaled_product_triton(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `scaled_product`."""
    return _launch(x.values, x.scale, weight, weight_scale, dtype, False)


def swiglu_product_triton(
    x: Tokens,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    format: TokenFormat | None = None,
) -> Tokens:
    """See `swiglu_product`."""
    values, scale = (x.values, x.scale) if isinstance(x, QuantizedTokens) else (x, None)
    out = _launch(values, scale, weight, weight_scale, dtype, True)
    return out if format is None else quantize_tokens_triton(out, format)
