"""Adapters beside a fused matrix: their two small products, chosen token by token.

    lora_shrink:   h[t, a] = down[slot] x[t]
    lora_expand:   out[t] += sum over a of scale * up[slot] h[t, a]       in place

``slot`` and ``scale`` are those of the token's row (its sequence) and of the row's adapter a. A
slot holds one adapter's factors of this matrix, at an address that stays, so that a CUDA graph of
the kernels serves other adapters: which slots, how strong and for which tokens is read on the
device alone.

The fused matrix has parts (queries, keys, ...), each with factors of its own. All parts of a slot
lie one below the other in ``down``, and one launch reads x once for all of them. In ``up`` each
output column belongs to one part and reads that part's R elements of h.

Sums, ``out`` included, are in float32, and ``out`` is rounded once, where it is stored. h is stored
in the compute dtype: the tensor cores of the second product read nothing finer, so that float32
would be rounded there all the same, after twice the bytes had passed through memory. The scale
multiplies the float32 sum behind that product, and costs no second rounding.

A program has a tile of tokens and takes the rows that it finds there one by one, nearly always a
single one. It multiplies the whole tile and stores the row's own tokens only: what other tokens
hold, NaNs included, never reaches them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea2_srt.kernels.quantize import QuantizedTokens, Tokens


@dataclass(frozen=True)
class LoraTiles:
    """How either product is cut among programs.

    Attributes:
        tokens: of a program.
        columns: most columns of a program's sums.
        depth_bytes: of a row of the factor, loaded at a time.
        num_warps: of a program.
        num_stages: loads under way.
    """

    tokens: int
    columns: int
    depth_bytes: int
    num_warps: int
    num_stages: int


SHRINK = LoraTiles(tokens=64, columns=64, depth_bytes=128, num_warps=8, num_stages=4)
"""Few columns, so that one image's few tokens keep a GPU busy: 4160 of them and 128 columns of h
are 130 programs.
"""

SHRINK_WIDE = LoraTiles(tokens=64, columns=128, depth_bytes=128, num_warps=8, num_stages=4)
"""From ``_WIDE_FROM`` columns of h on: each tile of columns reads x again, from the L2 cache. It
has 96 KiB of shared memory; with twice the tokens some GPUs spill registers.
"""

_WIDE_FROM = 256

EXPAND = LoraTiles(tokens=64, columns=64, depth_bytes=256, num_warps=8, num_stages=1)
"""A rank is a single step, so that no loads can be under way for the next one. Small tiles instead:
a processor holds several programs, which load while others multiply.
"""

_ODD_COLUMNS = 32
"""Columns of a program of `lora_expand` where the widths of the parts have no common tile."""


def lora_shrink(x: Tokens, down: Tensor, index: Tensor, slots: Tensor, parts: int) -> Tensor:
    """Multiply each token with the first factors of its adapters.

    Args:
        x: [T, width], in down's dtype or quantised.
        down: [num_slots, parts * R, width], contiguous; R is a power of two, at least 16.
        index: int32 [T], the row of each token. Tokens of a row that are consecutive are fastest.
        slots: int32 [rows, A], each row's slots, -1 for none.
        parts: that the fused matrix has.

    Returns:
        [T, A, parts * R] in down's dtype; 0 where a slot is -1.
    """
    _check_shrink(x, down, parts)
    h = torch.zeros(len(index), slots.shape[1], down.shape[1], dtype=down.dtype, device=down.device)
    of_rows = slots.tolist()
    for start, end, row in _runs(index):
        for adapter, slot in enumerate(of_rows[row]):
            if slot >= 0:
                h[start:end, adapter] = _floats(x, start, end) @ down[slot].float().t()
    return h


def lora_expand(
    out: Tensor,
    h: Tensor,
    up: Tensor,
    index: Tensor,
    slots: Tensor,
    scales: Tensor,
    part_starts: Sequence[int],
) -> None:
    """Add what each token's adapters change, in place.

    A token whose row has no adapter, or only some with a scale of 0, keeps its bits.

    Args:
        out: [T, columns], the fused matrix' product; contiguous.
        h: [T, A, parts * R] of `lora_shrink`.
        up: [num_slots, columns, R] in h's dtype, contiguous.
        index: int32 [T], the row of each token. Tokens of a row that are consecutive are fastest.
        slots: int32 [rows, A], each row's slots, -1 for none.
        scales: float32 [rows, A].
        part_starts: the first column of each part, from 0 on; the last part ends with the columns.
    """
    bounds = _bounds(out, h, up, part_starts)
    rank = up.shape[2]
    of_rows, scales_of_rows = slots.tolist(), scales.tolist()
    for start, end, row in _runs(index):
        total = None
        for adapter, (slot, scale) in enumerate(
            zip(of_rows[row], scales_of_rows[row], strict=True)
        ):
            if slot < 0 or scale == 0:
                continue
            if total is None:
                total = out[start:end].float()
            for part, (first, last) in enumerate(pairwise(bounds)):
                mine = h[start:end, adapter, part * rank : (part + 1) * rank].float()
                total[:, first:last] += scale * (mine @ up[slot, first:last].float().t())
        if total is not None:
            out[start:end] = total


def _runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, end, row) of consecutive tokens with one row."""
    rows, counts = torch.unique_consecutive(index, return_counts=True)
    ends = list(accumulate(counts.tolist(), initial=0))
    for row, (start, end) in zip(rows.tolist(), pairwise(ends), strict=True):
        yield start, end, row


def _floats(x: Tokens, start: int, end: int) -> Tensor:
    if isinstance(x, QuantizedTokens):
        return QuantizedTokens(x.values[start:end], x.scale[start:end]).dequantized()
    return x[start:end].float()


def _check_shrink(x: Tokens, down: Tensor, parts: int) -> None:
    assert down.shape[1] % parts == 0
    assert isinstance(x, QuantizedTokens) or x.dtype is down.dtype


def _bounds(out: Tensor, h: Tensor, up: Tensor, part_starts: Sequence[int]) -> tuple[int, ...]:
    """Columns where the parts begin, and where the last one ends."""
    bounds = (*part_starts, up.shape[1])
    assert bounds[0] == 0
    assert all(first < last for first, last in pairwise(bounds))
    assert out.shape[1] == up.shape[1]
    assert h.shape[2] == len(part_starts) * up.shape[2]
    return bounds


# Not specialised: other numbers of tokens, and buffers that begin elsewhere, must not compile a new
# kernel while requests wait.
@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["index_ptr", "slots_ptr"]
)
def _shrink_kernel(
    x_ptr,
    x_scale_ptr,
    down_ptr,
    index_ptr,
    slots_ptr,
    h_ptr,
    num_tokens,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * TOKENS
    left = (num_tokens - first).to(tl.int32)
    token = tl.arange(0, TOKENS)
    live = token < left
    # Beyond the last ones: those again, which are not stored.
    token = tl.minimum(token, left - 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    stored = live[:, None] & (column < OUT)[None, :]
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + first * WIDTH + (token[:, None] * WIDTH + depth[None, :])
    down_at = tl.minimum(column, OUT - 1)[:, None] * WIDTH + depth[None, :]
    h_at = h_ptr + first * (ADAPTERS * OUT) + (token[:, None] * (ADAPTERS * OUT) + column[None, :])
    index_ptr += first
    if SCALED:
        x_scale = tl.load(x_scale_ptr + first + token)[:, None]

    # The tile's rows, from the lowest one on.
    index = tl.load(index_ptr + token)
    row = tl.min(index, 0)
    last_row = tl.max(index, 0)
    while row <= last_row:
        own = stored & (index == row)[:, None]
        for adapter in range(ADAPTERS):
            slot = tl.load(slots_ptr + row * ADAPTERS + adapter)
            found = tl.zeros((TOKENS, COLUMNS), tl.float32)
            if slot >= 0:
                slot_ptr = down_ptr + slot.to(tl.int64) * (OUT * WIDTH)
                for start in range(0, WIDTH, DEPTH):
                    if WIDTH % DEPTH == 0:
                        x = tl.load(x_at + start)
                        down = tl.load(slot_ptr + start + down_at)
                    else:
                        inside = (start + depth < WIDTH)[None, :]
                        x = tl.load(x_at + start, inside, 0.0)
                        down = tl.load(slot_ptr + start + down_at, inside, 0.0)
                    # 16 bits hold every value of 8 bits exactly; the scale comes after the sum.
                    found = tl.dot(x.to(down.dtype), down.T, found, input_precision="ieee")
                if SCALED:
                    found *= x_scale
            tl.store(h_at + adapter * OUT, found.to(h_ptr.dtype.element_ty), own)
        row = tl.min(tl.where(index > row, index, last_row + 1), 0)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["index_ptr", "slots_ptr", "scales_ptr"],
)
def _expand_kernel(
    out_ptr,
    h_ptr,
    up_ptr,
    index_ptr,
    slots_ptr,
    scales_ptr,
    num_tokens,
    BOUNDS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    PARTS: tl.constexpr,
    OUT: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ADAPTERS_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # A tile of columns lies in one part.
    tile = tl.program_id(0)
    part = 0
    column_start = tile * COLUMNS
    column_end = BOUNDS[1]
    for later in tl.static_range(1, PARTS):
        begun = tile >= FIRST_TILES[later]
        part = tl.where(begun, later, part)
        if not EVEN:
            in_part = (tile - FIRST_TILES[later]) * COLUMNS
            column_start = tl.where(begun, BOUNDS[later] + in_part, column_start)
            column_end = tl.where(begun, BOUNDS[later + 1], column_end)
    column = column_start + tl.arange(0, COLUMNS)
    up_row = column if EVEN else tl.minimum(column, column_end - 1)

    first = tl.program_id(1).to(tl.int64) * TOKENS
    left = (num_tokens - first).to(tl.int32)
    token = tl.arange(0, TOKENS)
    live = token < left
    # Beyond the last ones: those again, which are not stored.
    token = tl.minimum(token, left - 1)
    stored = live[:, None] & (EVEN | (column < column_end))[None, :]
    in_tile = token[:, None] * OUT + tl.arange(0, COLUMNS)[None, :]
    out_at = out_ptr + first * OUT + column_start + in_tile
    depth = tl.arange(0, DEPTH)
    h_ptr += first * (ADAPTERS * PARTS * RANK) + part * RANK
    h_at = token[:, None] * (ADAPTERS * PARTS * RANK) + depth[None, :]
    up_at = up_row[:, None] * RANK + depth[None, :]
    index_ptr += first
    adapters = tl.arange(0, ADAPTERS_BLOCK)

    # The tile's rows, from the lowest one on.
    index = tl.load(index_ptr + token)
    row = tl.min(index, 0)
    last_row = tl.max(index, 0)
    while row <= last_row:
        at = row * ADAPTERS
        mask = adapters < ADAPTERS
        slots = tl.load(slots_ptr + at + adapters, mask, -1)
        scales = tl.load(scales_ptr + at + adapters, mask, 0.0)
        # The output of a row without adapters is neither read nor stored.
        if tl.max(((slots >= 0) & (scales != 0)).to(tl.int32), 0) > 0:
            own = stored & (index == row)[:, None]
            out = tl.load(out_at, own, 0.0)  # on its way while the adapters are multiplied
            total = tl.zeros((TOKENS, COLUMNS), tl.float32)
            for adapter in range(ADAPTERS):
                slot = tl.load(slots_ptr + at + adapter)
                scale = tl.load(scales_ptr + at + adapter)
                if (slot >= 0) & (scale != 0):
                    found = tl.zeros((TOKENS, COLUMNS), tl.float32)
                    for start in tl.static_range(0, RANK, DEPTH):
                        h = tl.load(h_ptr + adapter * (PARTS * RANK) + start + h_at)
                        up = tl.load(up_ptr + slot.to(tl.int64) * (OUT * RANK) + start + up_at)
                        found = tl.dot(h, up.T, found, input_precision="ieee")
                    total += scale * found
            total += out.to(tl.float32)
            tl.store(out_at, total.to(out_ptr.dtype.element_ty), own)
        row = tl.min(tl.where(index > row, index, last_row + 1), 0)


def lora_shrink_triton(x: Tokens, down: Tensor, index: Tensor, slots: Tensor, parts: int) -> Tensor:
    """See `lora_shrink`; x, index and slots must be contiguous."""
    _check_shrink(x, down, parts)
    values, scale = (x.values, x.scale) if isinstance(x, QuantizedTokens) else (x, None)
    assert all(t.is_contiguous() for t in (values, down, index, slots))
    num_tokens, width = values.shape
    columns, adapters = down.shape[1], slots.shape[1]
    tiles = SHRINK if columns < _WIDE_FROM else SHRINK_WIDE
    tile = min(tiles.columns, triton.next_power_of_2(columns))
    h = torch.empty(num_tokens, adapters, columns, dtype=down.dtype, device=down.device)
    _shrink_kernel[(triton.cdiv(columns, tile), triton.cdiv(num_tokens, tiles.tokens))](
        values,
        h if scale is None else scale,
        down,
        index,
        slots,
        h,
        num_tokens,
        WIDTH=width,
        OUT=columns,
        ADAPTERS=adapters,
        SCALED=scale is not None,
        TOKENS=tiles.tokens,
        COLUMNS=tile,
        DEPTH=tiles.depth_bytes // down.element_size(),
        # A thread of more warps would have less than 16 bytes of a small tile to load.
        num_warps=tiles.num_warps if tile >= 64 else 4,
        num_stages=tiles.num_stages,
    )
    return h


def lora_expand_triton(
    out: Tensor,
    h: Tensor,
    up: Tensor,
    index: Tensor,
    slots: Tensor,
    scales: Tensor,
    part_starts: Sequence[int],
) -> None:
    """See `lora_expand`; index, slots and scales must be contiguous."""
    bounds = _bounds(out, h, up, part_starts)
    assert all(t.is_contiguous() for t in (out, h, up, index, slots, scales))
    assert h.dtype is up.dtype
    num_tokens, adapters, _ = h.shape
    columns, rank = up.shape[1:]
    tiles = EXPAND
    widths = [last - first for first, last in pairwise(bounds)]
    tile, even = _column_tile(widths, tiles.columns)
    first_tiles = list(accumulate((triton.cdiv(width, tile) for width in widths), initial=0))
    _expand_kernel[(first_tiles[-1], triton.cdiv(num_tokens, tiles.tokens))](
        out,
        h,
        up,
        index,
        slots,
        scales,
        num_tokens,
        BOUNDS=bounds,
        FIRST_TILES=tuple(first_tiles),
        PARTS=len(widths),
        OUT=columns,
        EVEN=even,
        RANK=rank,
        ADAPTERS=adapters,
        ADAPTERS_BLOCK=triton.next_power_of_2(adapters),
        TOKENS=tiles.tokens,
        COLUMNS=tile,
        DEPTH=min(rank, tiles.depth_bytes // up.element_size()),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _column_tile(widths: Sequence[int], most: int) -> tuple[int, bool]:
    """Columns of a program, and whether every part is a whole number of them: then no mask keeps
    loads from being wide, as at all sizes of the released model.
    """
    tile = math.gcd(most, *widths)
    return (tile, True) if tile >= 16 else (_ODD_COLUMNS, False)
