"""Kernels that do more than one thing, against the things one by one: which of them pays here?"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from krea2_bench.gpu.attention import exact, inputs
from krea2_bench.gpu.context import Context
from krea2_bench.gpu.correctness import check
from krea2_bench.gpu.gemm import shapes
from krea2_bench.gpu.rows import timed
from krea2_bench.gpu.sequences import relative
from krea2_bench.gpu.timing import timings
from krea2_srt.kernels.attention import gated_attention, gated_attention_triton
from krea2_srt.kernels.products import (
    scaled_product,
    scaled_product_torch,
    swiglu_product,
    swiglu_product_triton,
)
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat, quantize_rows
from krea2_srt.model.pack import Segments
from krea2_srt.model.quantization import DTYPES
from krea2_srt.runner.products import known_products

TOKENS = (4160, 16448, 1088, 320)
PACKS = {"1024x1024": [4160], "4 of 512x512": [1088] * 4, "2048x2048": [16448]}

FP8 = torch.float8_e4m3fn
CHECKED_ROWS = 32
"""Rows of a product, at its start and at its end, that are computed exactly."""

Works = dict[str, Callable[[], object]]


def run(context: Context) -> None:
    """SwiGLU in its product, scales in an 8-bit product, the gate in attention; in turn."""
    for tokens in (24,) if context.smoke else TOKENS:
        with context.findings.attempt("fused", f"SwiGLU {tokens} bf16"):
            _swiglu(context, tokens, None)
        if context.on_gpu:  # the quantised operands of a trial say nothing more
            with context.findings.attempt("fused", f"SwiGLU {tokens} fp8"):
                _swiglu(context, tokens, TokenFormat())
        for format, dtype in DTYPES.items():
            if format == "int8" and not context.smoke and tokens != TOKENS[0]:
                continue  # the part ``gemm`` has its times
            with context.findings.attempt("fused", f"{format} product {tokens}"):
                _scaled(context, tokens, format, dtype)
    for name, lengths in PACKS.items():
        lengths = [max(1, n // 100) for n in lengths] if context.smoke else lengths
        with context.findings.attempt("fused", f"gated attention {name}"):
            _gated(context, name, lengths)


def _swiglu(context: Context, tokens: int, format: TokenFormat | None) -> None:
    """The gate-up product with SiLU * up: one kernel, or a product and a kernel."""
    inputs_, outputs = shapes(context.config)["gate_up"]
    x, weight = _random(context, tokens, inputs_), _random(context, outputs, inputs_)
    weight *= inputs_**-0.5
    name = f"SwiGLU {tokens} {'fp8' if format else 'bf16'}"
    fused = swiglu_product_triton if context.on_gpu else swiglu_product
    silu_mul, dtype = context.operations.silu_mul, context.dtype
    rows = _ends(context, tokens)
    if format is None:
        works: Works = {
            "fused": lambda: fused(x, weight, None, dtype),
            "one by one": lambda: silu_mul(F.linear(x, weight), None),
        }
        some = swiglu_product(x[rows], weight, None, torch.float32)
        got = works["fused"]()
    else:
        tokens_, w = quantize_rows(x.float(), FP8), quantize_rows(weight.float(), FP8)
        works = {
            "fused": lambda: fused(tokens_, w.values, w.scale, dtype, format),
            "one by one": lambda: silu_mul(
                scaled_product_torch(tokens_, w.values, w.scale, dtype), format
            ),
        }
        ends = QuantizedTokens(tokens_.values[rows], tokens_.scale[rows])
        some = swiglu_product(ends, w.values, w.scale, torch.float32)
        got = works["fused"]().dequantized()
    tolerance = 1e-2 if format is None else 5e-2
    check(context, "fused", f"{name} vs float32", relative(got[rows], some), tolerance)
    _time(context, name, works)


def _scaled(context: Context, tokens: int, format: str, dtype: torch.dtype) -> None:
    """8-bit products with scales of rows, by all that a server chooses from."""
    inputs_, outputs = shapes(context.config)["qkvg"]
    x = quantize_rows(_random(context, tokens, inputs_).float(), dtype)
    w = quantize_rows(_random(context, outputs, inputs_).float(), dtype)
    name = f"{format} product {tokens}"
    works: Works = {}
    rows = _ends(context, tokens)
    some = scaled_product(
        QuantizedTokens(x.values[rows], x.scale[rows]), w.values, w.scale, torch.float32
    )
    for how, product in known_products(triton=context.on_gpu).items():
        work = partial(product, x, w.values, w.scale, context.dtype)
        with context.findings.where_possible("fused", f"{name}, {how}"):
            error = relative(work()[rows], some)
            works[how] = work
        if how in works:
            check(context, "fused", f"{name}, {how}, vs float32", error, 1e-2)
    if works:
        _time(context, name, works)


def _gated(context: Context, name: str, lengths: list[int]) -> None:
    """Attention that gates its own output, against the fastest back end and a gate after it."""
    q, k, v, segments = inputs(context, lengths)
    gate = _random(context, len(q), q.shape[1] * q.shape[2])
    ours = gated_attention_triton if context.on_gpu else gated_attention
    backend = context.plain_attention.eager

    def one_by_one() -> Tensor:
        out = backend.attend(q, k, v, segments)
        return context.operations.sigmoid_gate(out.flatten(-2), gate, None)

    fused = partial(ours, q, k, v, gate, segments.cu_seqlens)
    end = segments.spans[0][1]
    first = Segments.of([end], context.device)
    expected = exact(q[:end], k[:end], v[:end], first).flatten(1) * gate[:end].float().sigmoid()
    what = f"gated attention {name}"
    error = relative(fused()[:end].flatten(1), expected)
    check(context, "fused", f"{what} vs float32", error, 1e-2)
    _time(context, what, {"fused": fused, f"{backend.name}, one by one": one_by_one})


def _ends(context: Context, tokens: int) -> Tensor:
    """Rows of the first and of the last tile of tokens, which is not a full one."""
    count = min(tokens, CHECKED_ROWS)
    rows = [torch.arange(count), torch.arange(tokens - count, tokens)]
    return torch.cat(rows).to(context.device)


def _time(context: Context, name: str, works: Works) -> None:
    seconds = context.seconds / 5
    found = timings(list(works.values()), context.device, seconds, warm_ups=2)
    for how, timing in zip(works, found, strict=True):
        context.findings.add(timed("fused", f"{name}, {how}", timing))


def _random(context: Context, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=context.device, dtype=context.dtype)
