"""Which kernel multiplies in 8 bits, by trial and by the clock."""

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from krea2_srt.errors import ConfigError, first_line
from krea2_srt.kernels.products import (
    ScaledProduct,
    scaled_product,
    scaled_product_torch,
    scaled_product_triton,
)
from krea2_srt.kernels.quantize import QuantizedTokens, quantize_rows
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import DTYPES, Quantization, QuantizedLinear
from krea2_srt.runner.attention import Timer, cuda_milliseconds
from krea2_srt.runner.race import Race

logger = logging.getLogger(__name__)

TOKENS = (320, 4160)
"""Tokens of the packs that the choice is for, as much for one as for the other: one image of
256x256 and one of 1024x1024.
"""

_TRIAL_TOKENS = 1037
"""An odd number of nine tiles, so that there are full ones, a last one, and more than one group."""

_TRIAL_COLUMNS = 256
"""Columns of a product that are compared with the reference, spread over all."""


def sglang_product(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` by SGLang's kernels, of the package sglang-kernel. That of int8 is for GPUs
    from Ampere to Hopper, widths of a multiple of 16 and columns of a multiple of 8.
    """
    # Here, so that a kernel that cannot be imported fails its trial and no more.
    import sgl_kernel

    int8 = x.values.dtype is torch.int8
    product = sgl_kernel.int8_scaled_mm if int8 else sgl_kernel.fp8_scaled_mm
    out: Tensor = product(x.values, weight.t(), x.scale, weight_scale, dtype)
    return out


def known_products(triton: bool = True) -> dict[str, ScaledProduct]:
    """Those whose package is installed, by name; with Triton's own kernels or without."""
    found: dict[str, ScaledProduct] = {"torch": scaled_product_torch}
    if triton:
        found["triton"] = scaled_product_triton
    if find_spec("sgl_kernel") is not None:
        found["sglang"] = sglang_product
    return found


def product_candidates(
    forced: str,
    device: torch.device,
    quantization: Quantization | None,
    known: Mapping[str, ScaledProduct],
) -> dict[str, ScaledProduct]:
    """What there is to choose from; nothing where no 8 bits are multiplied on a GPU.

    Args:
        forced: a name, to have no other, or ``auto``.
        device, quantization: of the model.
        known: by name, see `known_products`.

    Raises:
        ConfigError: the forced one is not there, or has nothing to multiply.
    """
    if device.type != "cuda" or quantization is None:
        if forced not in ("auto", "torch"):
            raise ConfigError(
                f"products: {forced} multiplies matrices of --quantization {' or '.join(DTYPES)} "
                f"on a GPU, and there are none"
            )
        return {}
    if forced == "auto":
        return dict(known)
    if forced not in known:
        raise ConfigError(
            f"products: {forced} is not there for {quantization.format}; there are "
            f"{', '.join(known)}"
        )
    return {forced: known[forced]}


def use_fastest_product(
    dit: Krea2DiT, candidates: Mapping[str, ScaledProduct], timer: Timer = cuda_milliseconds
) -> str:
    """Let all 8-bit matrices multiply by the fastest candidate that is right.

    Args:
        dit: the model, on its device.
        candidates: by name; a single one is only tried.
        timer: see `Race`.

    Returns:
        The one's name; empty where there are no matrices.

    Raises:
        ConfigError: none is right.
    """
    linears = [module for module in dit.modules() if isinstance(module, QuantizedLinear)]
    shapes = {linear.weight.shape: linear for linear in reversed(linears)}
    if not candidates or not shapes:
        return ""
    race = Race(timer)
    totals: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    for name, product in candidates.items():
        if fault := _fault(race, product, list(shapes.values())):
            faults[name] = fault
            logger.info("krea2-srt: 8-bit product %s is passed over: %s", name, fault)
        elif len(candidates) == 1:
            totals[name] = []
        else:
            try:
                totals[name] = [
                    sum(race.ms(_call(product, linear, tokens)) for linear in shapes.values())
                    for tokens in TOKENS
                ]
            except Exception as error:  # it does few tokens and not many, or memory ran out
                faults[name] = first_line(error)
                logger.info("krea2-srt: 8-bit product %s is passed over: %s", name, faults[name])
    if not totals:
        reasons = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise ConfigError(f"products: none works on this device: {reasons}")
    best = min(totals, key=lambda name: prod(totals[name]))
    for linear in linears:
        linear.product = candidates[best]
    if len(candidates) > 1:
        logger.info(
            "krea2-srt: 8-bit product %s; ms of a block's at %s tokens: %s",
            best,
            " and ".join(map(str, TOKENS)),
            ", ".join(
                f"{name} {' and '.join(f'{ms:.3g}' for ms in times)}"
                for name, times in sorted(totals.items(), key=lambda item: prod(item[1]))
            ),
        )
    return best


def _fault(race: Race, product: ScaledProduct, linears: list[QuantizedLinear]) -> str:
    for linear in linears:
        step = max(1, len(linear.weight) // _TRIAL_COLUMNS)
        x = _tokens(linear, _TRIAL_TOKENS)
        some, scale = linear.weight[::step], linear.scale[::step]
        expected = scaled_product(x, some, scale, linear.dtype)
        if fault := race.fault(_call(product, linear, _TRIAL_TOKENS, step), expected):
            return fault
    return ""


def _call(
    product: ScaledProduct, linear: QuantizedLinear, tokens: int, step: int = 1
) -> Callable[[], Tensor]:
    """A product; it returns one column of every ``step``."""
    x = _tokens(linear, tokens)
    return lambda: product(x, linear.weight, linear.scale, linear.dtype)[:, ::step]


def _tokens(linear: QuantizedLinear, tokens: int) -> QuantizedTokens:
    device = linear.weight.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, linear.weight.shape[1], generator=generator, device=device)
    return quantize_rows(x, linear.format.dtype)
