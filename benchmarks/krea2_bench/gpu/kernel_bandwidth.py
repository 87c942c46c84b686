"""Each kernel's bytes per second against those of a copy."""

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.kernel_cases import cases
from krea2_bench.gpu.rows import rate
from krea2_bench.gpu.timing import queued

TOKENS = 16448
"""Tokens of an image of 2048 x 2048: a stream of 202 MB, more than three times an H200's cache."""

SECONDS = 0.15
"""Seconds of each kernel."""


def run(context: Context) -> None:
    """Without the time of launches, which graphs save; from memory, not from the cache."""
    copy = context.findings.get("ceilings", "copy")
    tokens = 40 if context.smoke else TOKENS
    for case in cases(context, tokens, 2 * context.l2_bytes):
        with context.findings.attempt("kernels", case.what):
            timing = queued(case.call, context.device, 2 if context.smoke else 10, SECONDS)
            context.findings.add(
                rate("kernels", case.what, case.nbytes / 1e6, timing, "GB/s", copy)
            )
