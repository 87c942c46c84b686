"""Each kernel's bytes per second against those of a copy."""

from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.kernel_cases import cases
from benchmarks.on_gpu.rows import Row
from benchmarks.on_gpu.timing import queued

TOKENS = 4160
"""Of an image of 1024 x 1024: most operands are larger than the GPU's cache."""


def run(context: Context) -> None:
    """Without the time of launches, which graphs save."""
    copy = context.findings.get("ceilings", "copy")
    for case in cases(context, 40 if context.smoke else TOKENS):
        timing = queued(case.call, context.device, 2 if context.smoke else 20)
        context.findings.rows.append(
            Row(
                "kernels",
                case.what,
                case.nbytes / timing.median / 1e6,
                "GB/s",
                case.nbytes / timing.high / 1e6,
                case.nbytes / timing.low / 1e6,
                copy,
                better="more",
                note=f"{timing.median * 1e3:.1f} us at {TOKENS} tokens",
            )
        )
