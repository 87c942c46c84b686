"""Before any time is measured: is every kernel right on this device?"""

from krea2_bench.gpu.context import Context
from krea2_bench.gpu.kernel_cases import cases, error_of
from krea2_bench.gpu.rows import Row

TOKENS = (1037, 16448)
"""An odd number; and those of an image of 2048 x 2048, whose offsets are large."""


class WrongResult(Exception):
    """A figure is off, so no time means anything."""


def run(context: Context) -> None:
    """Every kernel against float64; all of them, so that one that is wrong hides no other."""
    for tokens in (37, 61) if context.smoke else TOKENS:
        for case in cases(context, tokens):
            what = f"{case.what} vs float64, {tokens} tokens"
            with context.findings.attempt("correctness", what):
                check(context, "correctness", what, *error_of(context, case))


def check(
    context: Context,
    part: str,
    what: str,
    error: float,
    tolerance: float,
    unit: str = "relative error",
    how: str = "",
) -> None:
    """A row of an error.

    Raises:
        WrongResult: it is larger than it may be.
    """
    note = f"at most {tolerance:g}"
    context.findings.add(Row(part, what, error, unit, note=note, how=how))
    if not error <= tolerance:
        raise WrongResult(f"{what}: {error:.3g} {unit}, {note}")
