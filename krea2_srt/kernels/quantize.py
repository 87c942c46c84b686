"""Per-token dynamic quantisation, with an optional Hadamard rotation before it.

    x' = x H                       H = blocks of a regular Hadamard matrix on the diagonal
    scale = max |x'| / largest     per token
    values = round(x' / scale)     in e4m3 or int8

The rotation spreads a token's outliers over their block. It is its own inverse, so a matrix that
has been rotated the same way along its inputs gives the same product.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.launch import device_of

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest value of each format that is used."""

SMALLEST = 1e-12
"""Largest magnitude of a token that counts as zero."""

ROTATIONS = (256, 64, 16)
"""Block sizes, best first. The first is that of files with rotated weights (ComfyUI's ConvRot)."""


_PIECE_ELEMENTS = 2**19
"""Elements of a piece of tokens on a CPU: 2 MiB in float32, twice while one is made of another.
Half as many cost more in calls than they save.
"""


@dataclass(frozen=True)
class TokenFormat:
    """How a matrix multiplication reads its tokens.

    Attributes:
        dtype: float8_e4m3fn or int8.
        rotation: block size of the Hadamard rotation along the width; 0 for none.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    rotation: int = 0


@dataclass(frozen=True)
class QuantizedTokens:
    """Tokens whose elements are ``values * scale``.

    Attributes:
        values: [T, width] in the format's dtype.
        scale: float32 [T, 1].
    """

    values: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def dequantized(self) -> Tensor:
        """float32 [T, width]; still rotated."""
        return self.values.float() * self.scale


Tokens = Tensor | QuantizedTokens


def rotation_block(width: int) -> int:
    """The best block that a width can be rotated in; 0 if there is none."""
    return next((block for block in ROTATIONS if width % block == 0), 0)


_REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The regular Hadamard matrix [size, size], orthonormal and symmetric; size is a power of 4.

    It is the Kronecker power of `_REGULAR` / 2, which is what files with rotated weights are made
    with (ComfyUI's ConvRot, arXiv:2512.03673). All its rows have the same sum, so unlike
    Sylvester's it does not gather the mean of a token in one element.
    """
    matrix, step = torch.ones(1, 1), torch.tensor(_REGULAR) / 2
    while len(matrix) < size:
        matrix = torch.kron(matrix, step)
    assert len(matrix) == size, f"{size} is no power of 4"
    return matrix.to(device, dtype)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate the last dimension in blocks; float32, same shape."""
    return (x.float().unflatten(-1, (-1, block)) @ hadamard(block, x.device)).flatten(-2)


def pieces_of(x: Tensor) -> tuple[Tensor, ...]:
    """The tokens [T, width] in pieces that are worked on one after the other.

    On a CPU a piece in float32 stays in its cores' caches; the whole of a large pack would pass
    through memory once for each of the operations. On CUDA it is one piece: launches cost more.
    """
    return (x,) if x.is_cuda else x.split(max(1, _PIECE_ELEMENTS // x.shape[-1]))


def quantize_tokens(x: Tensor, format: TokenFormat) -> QuantizedTokens:
    """Quantise each token by its own scale.

    Args:
        x: [T, width].
        format: how.
    """
    tokens = finish_tokens(pieces_of(x), x, format)
    assert isinstance(tokens, QuantizedTokens)
    return tokens


def quantize_rows(x: Tensor, dtype: torch.dtype) -> QuantizedTokens:
    """Quantise each row of a float32 matrix by its own scale, on all devices to the same bits."""
    largest = LARGEST[dtype]
    # On CUDA, torch divides by a number as it multiplies by its rounded inverse.
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST) / x.new_full((1, 1), largest)
    values = x * (1 / scale)
    if dtype is torch.int8:
        values.round_()
    return QuantizedTokens(values.clamp_(-largest, largest).to(dtype), scale)


def finish_tokens(pieces: Iterable[Tensor], like: Tensor, format: TokenFormat | None) -> Tokens:
    """What results become: of the compute dtype, or quantised.

    Args:
        pieces: of them, in order, in float32 or what it holds; no more are held at a time than
            make a piece of the size that `pieces_of` gives.
        like: [T, width] in the compute dtype.
        format: how they are quantised; None if they are not.
    """
    gathered = _gathered(pieces)
    first = next(gathered)
    if len(first) == len(like):
        return _finished(first, like.dtype, format)
    out = like.new_empty(like.shape, dtype=like.dtype if format is None else format.dtype)
    scale = like.new_empty(len(like), 1, dtype=torch.float32)
    end = 0
    for piece in chain((first,), gathered):
        place = slice(end, end := end + len(piece))
        tokens = _finished(piece, like.dtype, format)
        if isinstance(tokens, QuantizedTokens):
            out[place], scale[place] = tokens.values, tokens.scale
        else:
            out[place] = tokens
    assert end == len(like)
    return out if format is None else QuantizedTokens(out, scale)


def _gathered(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same in fewer pieces, where small ones follow each other."""
    some: list[Tensor] = []
    for piece in pieces:
        if some and sum(map(Tensor.numel, some)) + piece.numel() > _PIECE_ELEMENTS:
            yield some[0] if len(some) == 1 else torch.cat(some)
            some = []
        some.append(piece)
    yield some[0] if len(some) == 1 else torch.cat(some)


def _finished(x: Tensor, dtype: torch.dtype, format: TokenFormat | None) -> Tokens:
    if format is None:
        return x.to(dtype)
    return quantize_rows(rotate(x, format.rotation) if format.rotation else x.float(), format.dtype)


def largest_of(format: TokenFormat | None) -> float:
    """The largest value that `store_token` makes for a format; 0 where nothing is quantised."""
    return LARGEST[format.dtype] if format else 0.0


def output_tokens(like: Tensor, width: int, format: TokenFormat | None) -> tuple[Tensor, Tensor]:
    """What `store_token` writes to: values [T, width] and scales [T, 1].

    Scales that a format does not need are a stand-in.
    """
    tokens = len(like)
    if format is None:
        return like.new_empty(tokens, width), like
    return (
        like.new_empty(tokens, width, dtype=format.dtype),
        like.new_empty(tokens, 1, dtype=torch.float32),
    )


@triton.jit
def rotated(x, BLOCK: tl.constexpr, ROTATION: tl.constexpr):
    """Rotate a token [BLOCK] in blocks; padding beyond its width is whole blocks of zeros.

    A Kronecker power is as many stages of its factor. One stage gives of four elements, of which
    the other one is that from the other end, half their sum less the other one.
    """
    for stage in tl.static_range(5):  # files have blocks of up to 1024
        if 4**stage < ROTATION:
            fours = tl.reshape(x, (BLOCK // 4 ** (stage + 1), 4, 4**stage))
            fours = tl.sum(fours, 1, keep_dims=True) * 0.5 - tl.flip(fours, 1)
            x = tl.reshape(fours, (BLOCK,))
    return x


@triton.jit
def store_token(
    x,
    token,
    columns,
    mask,
    out_ptr,
    out_scale_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """Store a token, float32 [BLOCK] with zeros beyond WIDTH.

    As it is where LARGEST is 0, else rotated and quantised, see `quantize_rows`: to the same bits.
    """
    if LARGEST > 0:
        if ROTATION > 0:
            x = rotated(x, BLOCK, ROTATION)
        # Of positive numbers the bits have the same order, with NaN as the largest: integers have
        # none, and without a scale that is one it would be lost.
        largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        largest = tl.maximum(largest, 1e-12, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.div_rn(largest, LARGEST)
        x = x * tl.div_rn(1.0, scale)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        if out_ptr.dtype.element_ty == tl.int8:
            # Beside 1.5 * 2^23 a float32 has no fraction: the sum is rounded, half to even, and its
            # last byte is the whole number.
            x = (x + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(out_scale_ptr + token, scale)
    tl.store(out_ptr + token.to(tl.int64) * WIDTH + columns, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _quantize_kernel(
    x_ptr,
    out_ptr,
    out_scale_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATION: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + token.to(tl.int64) * WIDTH + columns, mask, 0.0).to(tl.float32)
    store_token(x, token, columns, mask, out_ptr, out_scale_ptr, WIDTH, BLOCK, LARGEST, ROTATION)


def quantize_tokens_triton(x: Tensor, format: TokenFormat) -> QuantizedTokens:
    """See `quantize_tokens`; of contiguous tokens."""
    num_tokens, width = x.shape
    assert x.is_contiguous()
    launch, _ = device_of(x.device).launch("quantize_8bit", num_tokens)
    out, out_scale = output_tokens(x, width, format)
    _quantize_kernel[(num_tokens,)](
        x,
        out,
        out_scale,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        LARGEST=largest_of(format),
        ROTATION=format.rotation,
        num_warps=launch.num_warps,
    )
    return QuantizedTokens(out, out_scale)
