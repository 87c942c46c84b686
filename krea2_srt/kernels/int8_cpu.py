"""Products in int8 on a CPU, with their scales.

    (x W^T) * x_scale * w_scale        sums exact in int32, scales in float32, then rounded

Some columns at a time: their sums stay in the cores' caches until they are scaled and rounded. Of a
large pack the sums of all columns would be twice the result's bytes, in memory that the system has
to clear first, and reading them again takes half as long as the product.
"""

import torch
from torch import Tensor

from krea2_srt.kernels.quantize import QuantizedTokens

_SUMS = 2**20
"""Sums at a time: 4 MiB."""

_LEAST_COLUMNS = 512
"""A call's fixed work, which is reading the tokens, is little beside so many."""


def int8_product_cpu(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `scaled_product`; in int8. Widths up to 2**17 cannot overflow."""
    tokens, columns = len(x), len(weight)
    at_once = min(columns, max(_LEAST_COLUMNS, _SUMS // tokens // 64 * 64))
    if at_once == columns:
        sums = torch._int_mm(x.values, weight.t())
        return sums.float().mul_(x.scale).mul_(weight_scale.t()).to(dtype)
    out = x.values.new_empty(tokens, columns, dtype=dtype)
    sums = x.values.new_empty(tokens * at_once, dtype=torch.int32)
    for start in range(0, columns, at_once):
        rows = slice(start, min(start + at_once, columns))
        some = sums[: tokens * (rows.stop - start)].view(tokens, -1)
        torch._int_mm(x.values, weight[rows].t(), out=some)
        out[:, rows] = some.float().mul_(x.scale).mul_(weight_scale[rows].t())
    return out
