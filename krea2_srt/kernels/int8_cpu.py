"""Products in int8 on a CPU, with their scales.

    (x W^T) * x_scale * w_scale        sums exact in int32, scales in float32, then rounded

Some columns at a time: their sums stay in the cores' caches until they are scaled and rounded. Of a
large pack the sums of all columns would be twice the result's bytes, in memory that the system has
to clear first, and reading them again takes half as long as the product.

torch's product is oneDNN's. On CPUs without VNNI that adds each two products in 16 bits, which do
not hold them, and what comes out is far off. Sums in float32 are exact as long as they are short.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from krea2_srt.kernels.quantize import QuantizedTokens

logger = logging.getLogger(__name__)

_SUMS = 2**20
"""Sums at a time: 4 MiB."""

_LEAST_COLUMNS = 512
"""A call's fixed work, which is reading the tokens, is little beside so many."""

_FLOAT_WIDTH = 2**10
"""Products whose sum float32 holds exactly: none is above 2^14, and all whole numbers up to 2^24
have a float32.
"""


def int8_product_cpu(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `scaled_product`; in int8. Widths up to 2**17 cannot overflow."""
    tokens, columns = len(x), len(weight)
    at_once = min(columns, max(_LEAST_COLUMNS, _SUMS // max(1, tokens) // 64 * 64))
    out = x.values.new_empty(tokens, columns, dtype=dtype)
    sums = x.values.new_empty(tokens * at_once, dtype=torch.int32)
    for start in range(0, columns, at_once):
        rows = slice(start, min(start + at_once, columns))
        width = rows.stop - start
        some = sums[: tokens * width].view(tokens, width)
        _multiply(x.values, weight[rows], some)
        out[:, rows] = some.float().mul_(x.scale).mul_(weight_scale[rows].t())
    return out


def _multiply(x: Tensor, weight: Tensor, sums: Tensor) -> None:
    if _torch_is_exact():
        torch._int_mm(x, weight.t(), out=sums)
        return
    sums.zero_()
    for some, of_weight in zip(
        x.split(_FLOAT_WIDTH, 1), weight.split(_FLOAT_WIDTH, 1), strict=True
    ):
        sums += (some.float() @ of_weight.float().t()).int()


@cache
def _torch_is_exact() -> bool:
    """Whether torch's product is right on this CPU, by trial."""
    largest = torch.full((64, 256), 127, dtype=torch.int8)
    if bool((torch._int_mm(largest, largest.t()) == 256 * 127 * 127).all()):
        return True
    logger.info("krea2-srt: int8 is multiplied in float32: torch's own is not exact on this CPU")
    return False
