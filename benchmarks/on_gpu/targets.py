"""What must be reached on an H200, and whether it was."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.on_gpu.rows import Findings

Figure = Callable[[Findings], float | None]

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: is measured.
        limit: to be reached.
        at_least: whether the figure must be at least the limit, or at most.
        unit: of both.
        figure: finds it; None where it was not measured.
    """

    what: str
    limit: float
    at_least: bool
    unit: str
    figure: Figure

    def verdict(self, findings: Findings | None) -> tuple[str, str]:
        """The figure, and whether the target is reached; in words."""
        value = self.figure(findings) if findings is not None else None
        if value is None:
            return NOT_MEASURED, NOT_MEASURED
        reached = value >= self.limit if self.at_least else value <= self.limit
        return f"{value:.3g} {self.unit}".strip(), "yes" if reached else "no"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}".strip()


def _value(part: str, what: str) -> Figure:
    return lambda findings: findings.get(part, what)


def _share(what: str, as_figure: Callable[[float], float] = lambda share: 100 * share) -> Figure:
    """Of its floor, in percent unless told otherwise."""

    def figure(findings: Findings) -> float | None:
        row = findings.row("steps", what)
        return None if row is None or row.share is None else as_figure(row.share)

    return figure


def _over_floor(what: str) -> Figure:
    return _share(what, lambda share: 1 / share)


def _ratio(part: str, slow: str, fast: str) -> Figure:
    def figure(findings: Findings) -> float | None:
        above, below = findings.get(part, slow), findings.get(part, fast)
        return above / below if above and below else None

    return figure


def _slowest_against_compiled(findings: Findings) -> float | None:
    """The least speed-up over torch.compile, of the sizes that were compiled."""
    sides = ("256x256", "512x512", "1024x1024")
    found = [_ratio("steps", f"{side} compiled", f"{side} graph")(findings) for side in sides]
    known = [ratio for ratio in found if ratio is not None]
    return min(known, default=None)


def _seconds(what: str) -> Figure:
    def figure(findings: Findings) -> float | None:
        value = findings.get("pictures", what)
        return None if value is None else value / 1e3

    return figure


def _slowest_host(findings: Findings) -> float | None:
    found = [findings.get("steps", f"{side} host") for side in ("256x256", "512x512")]
    known = [value for value in found if value is not None]
    return max(known, default=None)


def _step(what: str, limit: float, row: str) -> Target:
    return Target(f"step {what}, share of its floor", limit, True, "%", _share(row))


TARGETS = (
    _step("1024x1024, bf16", 89, "1024x1024 graph"),
    Target("step 1024x1024, bf16", 160, False, "ms", _value("steps", "1024x1024 graph")),
    _step("2048x2048, bf16", 88, "2048x2048 graph"),
    Target("step 2048x2048, bf16", 845, False, "ms", _value("steps", "2048x2048 graph")),
    _step("512x512, graph", 80, "512x512 graph"),
    _step("4 of 512x512, graph", 89, "4 of 512x512 graph"),
    Target("step 256x256, graph, over its floor", 1.3, False, "x", _over_floor("256x256 graph")),
    Target("step 256x256, graph", 13, False, "ms", _value("steps", "256x256 graph")),
    Target(
        "step 8 of 256x256, graph, over its floor",
        1.15,
        False,
        "x",
        _over_floor("8 of 256x256 graph"),
    ),
    Target(
        "against plain PyTorch, 1024x1024",
        1.3,
        True,
        "x",
        _ratio("steps", "1024x1024 plain", "1024x1024 graph"),
    ),
    Target(
        "against plain PyTorch, 256x256",
        3,
        True,
        "x",
        _ratio("steps", "256x256 plain", "256x256 graph"),
    ),
    Target("against torch.compile, anywhere", 1, True, "x", _slowest_against_compiled),
    Target(
        "fp8 against bf16, 1024x1024",
        1.5,
        True,
        "x",
        _ratio("steps", "1024x1024 graph", "1024x1024 fp8"),
    ),
    Target(
        "fp8 against bf16, 2048x2048",
        1.4,
        True,
        "x",
        _ratio("steps", "2048x2048 graph", "2048x2048 fp8"),
    ),
    Target("picture 1024x1024, bf16", 1.37, False, "s", _seconds("1024x1024 bf16")),
    Target("picture 1024x1024, fp8", 0.95, False, "s", _seconds("1024x1024 fp8")),
    Target("picture 2048x2048, bf16", 7.0, False, "s", _seconds("2048x2048 bf16")),
    Target("picture 2048x2048, fp8", 5.0, False, "s", _seconds("2048x2048 fp8")),
    Target("VAE decode 1024x1024", 45, False, "ms", _value("vae", "1024x1024 ours")),
    Target("VAE decode 2048x2048", 190, False, "ms", _value("vae", "2048x2048 ours")),
    Target(
        "VAE decode against the 3-D original, 1024x1024",
        3,
        True,
        "x",
        _ratio("vae", "1024x1024 3-D original", "1024x1024 ours"),
    ),
    Target("host work per step while graphs replay", 0.5, False, "ms", _slowest_host),
)
