"""The four matrix products of a block, at the sizes of real packs and in every number format."""

import time
from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.rows import rate
from krea2_bench.gpu.timing import Timing, queued, wait
from krea2_srt.kernels.products import ScaledProduct
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.products import known_products

TOKENS = (320, 1088, 4160, 16448)
"""Tokens of one image of 256, 512, 1024 and 2048 pixels a side."""

SECONDS, SUSTAINED_S = 0.08, 2.0
"""Seconds of each product; and of the one that shows what is left when the GPU is hot."""

SCALED_INT8_TOKENS = 4160
"""Where int8 is multiplied by all that a server chooses from, with scales of rows."""

SMOKE_TOKENS = (8, 16)
"""On a CPU, where a product in fp8 takes 40 ms at the smallest sizes."""

Product = Callable[[Tensor, Tensor], Tensor]
"""x [M, K], weight [N, K] -> [M, N]."""


def shapes(config: Krea2Config) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a block's matrices, by name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.attention_head_dim
    kv_heads = config.num_key_value_heads * config.attention_head_dim
    return {
        "qkvg": (hidden, 2 * heads + 2 * kv_heads),
        "out": (heads, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }


def run(context: Context) -> None:
    """The largest packs first; what a format cannot do here is left out, with the reason."""
    tokens = SMOKE_TOKENS if context.smoke else TOKENS
    for rows in sorted(tokens, reverse=True):
        for name, (inputs, outputs) in shapes(context.config).items():
            some = kinds(context)
            if rows == (tokens[-1] if context.smoke else SCALED_INT8_TOKENS):
                some |= scaled_int8(context)
            for kind in some:
                _measure(context, f"{name} {rows} {kind}", kind, rows, inputs, outputs)
    inputs, outputs = shapes(context.config)["gate_up"]
    rows = tokens[-1] if context.smoke else 4160
    for kind in list(kinds(context))[:2]:
        _sustain(context, f"gate_up {rows} {kind}, sustained", kind, rows, inputs, outputs)


def kinds(context: Context) -> dict[str, tuple[torch.dtype, Product]]:
    """By name, the format of both operands, and the product. Scales are given, not computed; int8
    alone are sums without any.
    """
    fp8 = torch.float8_e4m3fn
    return {
        "bf16": (context.dtype, F.linear),
        "fp8 row-wise": (fp8, lambda x, w: _scaled(x, w, by_rows=True)),
        "fp8 tensor-wise": (fp8, lambda x, w: _scaled(x, w, by_rows=False)),
        "int8": (torch.int8, lambda x, w: torch._int_mm(x, w.t())),
    }


def scaled_int8(context: Context) -> dict[str, tuple[torch.dtype, Product]]:
    """The same of int8 with scales of rows, as `known_products` has it."""
    products = known_products(triton=context.on_gpu)
    return {
        f"int8 {name}": (torch.int8, partial(_with_scales, product, context.dtype))
        for name, product in products.items()
    }


def _with_scales(product: ScaledProduct, dtype: torch.dtype, x: Tensor, weight: Tensor) -> Tensor:
    tokens = QuantizedTokens(x, _ones((len(x), 1), x.device))
    return product(tokens, weight, _ones((len(weight), 1), x.device), dtype)


def _scaled(x: Tensor, weight: Tensor, by_rows: bool) -> Tensor:
    shape = (len(x), 1) if by_rows else ()
    other = (1, len(weight)) if by_rows else ()
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=_ones(shape, x.device),
        scale_b=_ones(other, x.device),
        out_dtype=torch.bfloat16,
        use_fast_accum=x.is_cuda,
    )


_SCALES: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _ones(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: to fill them would be a launch of its own."""
    key = (shape, device)
    if key not in _SCALES:
        _SCALES[key] = torch.ones(shape, device=device)
    return _SCALES[key]


def _measure(context: Context, what: str, kind: str, rows: int, inputs: int, outputs: int) -> None:
    with context.findings.where_possible("gemm", what):
        work = _rotating(context, kind, rows, inputs, outputs)
        count, seconds = (1, 0.0) if context.smoke else (4, SECONDS)
        timing = queued(work, context.device, count, seconds)
        _add(context, what, kind, rows * inputs * outputs, timing)


def _sustain(context: Context, what: str, kind: str, rows: int, inputs: int, outputs: int) -> None:
    """One product for seconds: the rate of the last quarter, when clocks have come down."""
    with context.findings.where_possible("gemm", what):
        work = _rotating(context, kind, rows, inputs, outputs)
        seconds, times = (0.01, 1) if context.smoke else (SUSTAINED_S, 10)
        quarters: list[list[float]] = [[], [], [], []]
        begun, start = time.monotonic(), time.perf_counter()
        for number in count():
            before = time.perf_counter()
            if number and before - start >= seconds:
                break
            for _ in range(times):
                work()
            wait(context.device)
            ms = (time.perf_counter() - before) * 1e3 / times
            quarters[min(3, int(4 * (before - start) / seconds))].append(ms)
        last = next(quarter for quarter in reversed(quarters) if quarter)
        middle, span = sorted(last)[len(last) // 2], (begun, time.monotonic())
        _add(
            context,
            what,
            kind,
            rows * inputs * outputs,
            Timing(middle, min(min(q) for q in quarters if q), max(last), span),
        )


def _rotating(
    context: Context, kind: str, rows: int, inputs: int, outputs: int
) -> Callable[[], object]:
    """The product on other operands each time, so many that the cache does not hold them: a
    block's weights come from memory.
    """
    dtype, product = (kinds(context) | scaled_int8(context))[kind]
    nbytes = (rows + outputs) * inputs * dtype.itemsize
    some = [
        (_random(context, rows, inputs, dtype), _random(context, outputs, inputs, dtype))
        for _ in range(1 + ceil(2 * context.l2_bytes / nbytes))
    ]
    operands = cycle(some)

    def work() -> None:
        x, weight = next(operands)
        product(x, weight)

    return work


def _random(context: Context, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random, since zeros run faster."""
    if dtype is torch.int8:
        return torch.randint(-127, 128, (rows, columns), device=context.device, dtype=dtype)
    return torch.randn(rows, columns, device=context.device, dtype=context.dtype).to(dtype)


def _add(context: Context, what: str, kind: str, products: int, timing: Timing) -> None:
    ceiling = context.findings.get("ceilings", f"matmul {kind.partition(' ')[0]}")
    context.findings.add(rate("gemm", what, 2 * products / 1e9, timing, "TFLOP/s", ceiling))
