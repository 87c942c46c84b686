"""Which rate of the estimates was wrong: parts of a step, as they were measured on their own."""

from collections.abc import Iterator

from krea2_bench.gpu import gemm
from krea2_bench.gpu.cost import Share, number, step
from krea2_bench.gpu.models import RELEASED
from krea2_bench.gpu.rows import Findings, Row
from krea2_bench.gpu.targets import TOKENS

HEAD = ("step", "part", "estimate", "measured alone")

_KERNELS = {"gated norm": 8.0, "qk norm rope": 2.5, "sigmoid gate": 3.0, "silu mul": 8.0}
"""Kernels of a block, with the widths of the token stream that each reads and writes; the norm runs
twice in a block.
"""


def lines(findings: Findings) -> Iterator[tuple[str, str, str, str]]:
    """Cells of a table: of every step that was measured, its parts and what is left of it."""
    for size, tokens in TOKENS.items():
        for format in _PRODUCTS:
            names = [f"{size} {'' if format == 'bf16' else f'{format} '}{way}" for way in _WAYS]
            rows = [row for name in names if (row := findings.row("steps", name)) is not None]
            if rows:
                row = min(rows, key=lambda row: row.value)
                yield from _of_step(findings, row, size, tokens, format)


_PRODUCTS = {
    "bf16": ("bf16",),
    "fp8": ("fp8 row-wise",),
    "int8": ("int8 torch", "int8 triton", "int8 sglang"),
}
"""Products of each format; the fastest counts."""

_SUFFIXES = {"bf16": "", "fp8": " fp8", "int8": " int8 rotated"}
"""What rows call the kernels that quantise what they write."""

_WAYS = ("graph", "eager")


def _of_step(
    findings: Findings, row: Row, size: str, tokens: int, format: str
) -> Iterator[tuple[str, str, str, str]]:
    estimate, total, known = step([tokens], format != "bf16"), 0.0, True
    for share in estimate.shares:
        rate = _rate(findings, share, row, size, tokens, format)
        alone = "not measured"
        if rate is None:
            known = False
        else:
            ms = share.amount / rate * 1e3
            total += ms
            alone = f"{number(ms)} ms at {number(rate)} {share.unit}"
        said = f"{number(share.ms)} ms at {number(share.rate)} {share.unit}"
        yield f"{size} {format}", share.name, said, alone
    rest = f"{row.value - total:.1f} ms" if known else "not known"
    yield f"{size} {format}", "all that is left", "0 ms", rest
    yield f"{size} {format}", "the step", f"{number(estimate.ms)} ms", f"{row.value:.4g} ms"


def _rate(
    findings: Findings, share: Share, row: Row, size: str, tokens: int, format: str
) -> float | None:
    """What was reached of a part, in the unit of its assumed rate."""
    if share.name == "GEMM":
        rates = [_products(findings, tokens, kind) for kind in _PRODUCTS[format]]
        return max((rate for rate in rates if rate is not None), default=None)
    if share.name == "attention":
        _, backend, *_ = [*row.how.split(", "), ""]
        return findings.get("attention", f"{backend} {size}")
    if share.name == "elementwise":
        return _kernels(findings, _SUFFIXES[format])
    return None


def _products(findings: Findings, tokens: int, kind: str) -> float | None:
    """TFLOP/s of a block's products together."""
    work = time = 0.0
    for name, (inputs, outputs) in gemm.shapes(RELEASED.dit).items():
        rate = findings.get("gemm", f"{name} {tokens} {kind}")
        if rate is None:
            return None
        work += inputs * outputs
        time += inputs * outputs / rate
    return work / time


def _kernels(findings: Findings, suffix: str) -> float | None:
    """TB/s of a block's kernels together."""
    time = 0.0
    for name, width in _KERNELS.items():
        rate = findings.get("kernels", name + ("" if name == "qk norm rope" else suffix))
        if rate is None:
            return None
        time += width / rate
    return sum(_KERNELS.values()) / time / 1e3
