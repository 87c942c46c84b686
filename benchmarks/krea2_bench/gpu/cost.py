"""How long things should take on an H200, from counts of operations and bytes.

Each time is a sum of a few amounts at a few rates, so that a figure that is missed can be traced to
the rate that was not reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from krea2_bench.gpu.models import RELEASED
from krea2_srt.model.flops import step_flops, step_weight_bytes

GEMM = 720.0
"""TFLOP/s of the blocks' products in bf16; 989 by the data sheet, 790 of a large one alone."""

GEMM_8_BIT = 1150.0
"""The same in 8 bits; 1979 by the data sheet."""

ATTENTION = 640.0
"""TFLOP/s of FlashAttention-3 in bf16."""

ATTENTION_FP8 = 1000.0
"""The same with queries, keys and values in 8 bits."""

MEMORY = 4.0
"""TB/s of kernels that only read and write."""

CONVOLUTION = 220.0
"""TFLOP/s of the VAE's, most of which have few channels."""

VAE_ATTENTION = 150.0
"""TFLOP/s of its one head of width 384."""

LAUNCH_MS = 0.005
"""From one short kernel of a graph to the next."""

_WIDTHS, _WIDTHS_8_BIT = 21.5, 18.7
"""Widths of the token stream that a block's kernels read and write, see docs/gpu.md; with 8-bit
outputs the norms, the gate and the product are half as wide.
"""

_PIXEL_MFLOP, _PIXEL_NORM_BYTES = 4.5, 15_000
"""Work per pixel of a decode: its convolutions by count, and what its norms read and write."""

_VAE_WIDTH = 384
_TEXT_LAYERS, _TEXT_KERNELS = 35, 30
_FUSION_KERNELS = 80
_LOOP_MS = 5.0
"""Milliseconds of a picture between its stages."""


@dataclass(frozen=True)
class Share:
    """One part of a time.

    Attributes:
        name: of it.
        amount: of work: TFLOP, TB, or launches.
        rate: per second.
        unit: of the rate; empty where the amount is seconds.
        factor: how many of them there are.
    """

    name: str
    amount: float
    rate: float
    unit: str = ""
    factor: float = 1.0

    @property
    def ms(self) -> float:
        return self.factor * self.amount / self.rate * 1e3


def number(value: float) -> str:
    """As few digits as matter here."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


@dataclass(frozen=True)
class Estimate:
    """A time, and what it is made of."""

    shares: tuple[Share, ...]

    @property
    def ms(self) -> float:
        return sum(share.ms for share in self.shares)

    def words(self) -> str:
        """Its parts, the largest first, as far as they can be seen in the sum."""
        shares = sorted(self.shares, key=lambda share: -share.ms)
        seen = [share for share in shares if share.ms >= 0.002 * self.ms]
        return " + ".join(f"{share.name} {number(share.ms)}" for share in seen) + " ms"

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.shares + other.shares)

    def times(self, count: int, name: str) -> "Estimate":
        """So many of them, as one part."""
        return Estimate((Share(name, self.ms / 1e3, 1.0, factor=count),))


def step(branches: Sequence[int], eight_bit: bool = False, fp8_attention: bool = False) -> Estimate:
    """One step of a pack of sequences with so many tokens; fp8 and int8 are as fast."""
    config, tokens = RELEASED.dit, sum(branches)
    linear, attention = step_flops(config, branches)
    gemm = GEMM_8_BIT if eight_bit else GEMM
    weights = step_weight_bytes(config) * (1 if eight_bit else 2)
    widths = _WIDTHS_8_BIT if eight_bit else _WIDTHS
    nbytes = widths * config.hidden_size * 2 * config.num_layers * tokens
    products = Share("GEMM", linear / 1e12, gemm, "TFLOP/s")
    if weights / 1e12 / MEMORY > linear / 1e12 / gemm:
        products = Share("weights", weights / 1e12, MEMORY, "TB/s")
    rate = ATTENTION_FP8 if fp8_attention else ATTENTION
    return Estimate(
        (
            products,
            Share("attention", attention / 1e12, rate, "TFLOP/s"),
            Share("elementwise", nbytes / 1e12, MEMORY, "TB/s"),
        )
    )


def decode(side: int) -> Estimate:
    """One square picture."""
    pixels = side * side
    tokens = pixels // 64
    attention = 4 * _VAE_WIDTH * tokens**2 / 1e12
    return Estimate(
        (
            Share("convolutions", _PIXEL_MFLOP * pixels / 1e6, CONVOLUTION, "TFLOP/s"),
            Share("norms", _PIXEL_NORM_BYTES * pixels / 1e12, MEMORY, "TB/s"),
            Share("attention", attention, VAE_ATTENTION, "TFLOP/s"),
        )
    )


def encode() -> Estimate:
    """One prompt of ordinary length, on a graph."""
    sizes = RELEASED.text
    hidden, head_dim = sizes["hidden_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    projections = (2 * heads + 2 * kv_heads) * head_dim
    layer = hidden * (projections + 3 * sizes["intermediate_size"])
    launches = _TEXT_LAYERS * _TEXT_KERNELS + _FUSION_KERNELS
    return Estimate(
        (
            Share("weights", 2 * layer * _TEXT_LAYERS / 1e12, MEMORY, "TB/s"),
            Share("short kernels", launches, 1e3 / LAUNCH_MS, "a second"),
        )
    )


def picture(
    side: int, steps: int = 8, eight_bit: bool = False, fp8_attention: bool = False
) -> Estimate:
    """From a prompt to pixels."""
    tokens = (side // 16) ** 2 + 64
    one = step([tokens], eight_bit, fp8_attention)
    return (
        one.times(steps, f"{steps} steps")
        + decode(side).times(1, "decode")
        + encode().times(1, "text")
        + Estimate((Share("between", _LOOP_MS / 1e3, 1.0),))
    )
