"""SGLang's int8 product behind a rotation, among those to choose from."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from krea2_srt.kernels.products import ScaledProduct
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.model.quantization import Quantization

logger = logging.getLogger(__name__)

GROUP = 64
"""What the kernel asks a width to be a multiple of. Its product is the same for all that it knows:
the tokens that it gets are rotated already.
"""


@cache
def convrot_kernel() -> Callable[..., Any]:
    """SGLang's function, compiled; once per machine that takes a minute.

    Raises:
        RuntimeError: it has none for this GPU, or it cannot be compiled here.
    """
    from sglang.kernels.ops.gemm import convrot_int8

    logger.info("krea2-srt: SGLang's convrot_int8 is compiled, where this machine has not yet")
    convrot_int8.load_convrot_int8_module()
    function: Callable[..., Any] = convrot_int8.convrot_int8_linear_prequant
    return function


def convrot_product(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` of int8 by SGLang's convrot_int8, for Hopper and Blackwell.

    Raises:
        RuntimeError: there is none for this GPU, or not of these sizes.
        ValueError: it is for bfloat16 alone.
    """
    if dtype is not torch.bfloat16:
        raise ValueError(f"convrot_int8 gives bfloat16, not {dtype}")
    scale = x.scale.flatten()
    out: Tensor = convrot_kernel()(x.values, scale, weight, weight_scale, None, GROUP)
    return out


def products(quantization: Quantization | None) -> dict[str, ScaledProduct]:
    """Those of SGLang for a format, by name."""
    int8 = quantization is not None and quantization.format == "int8"
    return {"sglang_convrot": convrot_product} if int8 else {}
