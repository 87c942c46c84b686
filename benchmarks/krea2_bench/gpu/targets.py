"""What must be reached on an H200, what arithmetic says of it, and whether it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from krea2_bench.gpu import cost
from krea2_bench.gpu.adapters import WITH
from krea2_bench.gpu.cost import Estimate
from krea2_bench.gpu.rows import Findings, Row

NOT_MEASURED = "not measured"

TOKENS = {"256x256": 320, "512x512": 1088, "1024x1024": 4160, "2048x2048": 16448}
"""Tokens of a step of one image."""

_MATMUL, _MATMUL_8_BIT, _COPY = 790.0, 1300.0, 4.3
"""TFLOP/s and TB/s at which floors are taken where there is no GPU to measure them."""


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        value: in the target's unit.
        row: from which it comes; None if from several.
    """

    value: float
    row: Row | None = None


Figure = Callable[[Findings], Found | None]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: is measured.
        limit: to be reached.
        at_least: whether the figure must be at least the limit, or at most.
        unit: of both.
        figure: finds it; None where it was not measured.
        estimated: the same by arithmetic; None where there is none.
        time: what the arithmetic is made of, of figures that are times.
    """

    what: str
    limit: float
    at_least: bool
    unit: str
    figure: Figure
    estimated: float | None = None
    time: Estimate | None = None

    def found(self, findings: Findings | None) -> Found | None:
        """What was measured, if it was."""
        return None if findings is None else self.figure(findings)

    def verdict(self, findings: Findings | None) -> tuple[str, str]:
        """The figure, and whether the target is reached; in words."""
        found = self.found(findings)
        if found is None:
            return NOT_MEASURED, NOT_MEASURED
        reached = found.value >= self.limit if self.at_least else found.value <= self.limit
        how = f" ({found.row.how})" if found.row is not None and found.row.how else ""
        return f"{found.value:.3g} {self.unit}{how}".strip(), "yes" if reached else "no"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}".strip()

    @property
    def estimate(self) -> str:
        """In words; empty where there is none."""
        return "" if self.estimated is None else f"{self.estimated:.3g} {self.unit}".strip()

    @property
    def of_which(self) -> str:
        """What the estimate is made of, in words."""
        return "" if self.time is None else self.time.words()


def _first(rows: Findings, part: str, names: Sequence[str]) -> Row | None:
    """The fastest of some rows: where a server has the choice, it takes that."""
    found = [row for name in names if (row := rows.row(part, name)) is not None]
    return min(found, key=lambda row: row.value, default=None)


def _value(part: str, *names: str, scale: float = 1.0) -> Figure:
    def figure(findings: Findings) -> Found | None:
        row = _first(findings, part, names)
        return None if row is None else Found(row.value * scale, row)

    return figure


def _share(part: str, names: Sequence[str], as_figure: Callable[[float], float]) -> Figure:
    def figure(findings: Findings) -> Found | None:
        row = _first(findings, part, names)
        if row is None or row.share is None:
            return None
        return Found(as_figure(row.share), row)

    return figure


def _ratio(slow: tuple[str, Sequence[str]], fast: tuple[str, Sequence[str]]) -> Figure:
    def figure(findings: Findings) -> Found | None:
        above, below = _first(findings, *slow), _first(findings, *fast)
        return Found(above.value / below.value) if above and below else None

    return figure


def _slowest_against_compiled(findings: Findings) -> Found | None:
    """The least speed-up over torch.compile, of the sizes that were compiled."""
    found = [
        _ratio(("compile", [f"{size} compiled"]), ("compile", _ways(size)))(findings)
        for size in TOKENS
    ]
    known = [one for one in found if one is not None]
    return min(known, key=lambda one: one.value, default=None)


def _largest(names: Sequence[str]) -> Figure:
    def figure(findings: Findings) -> Found | None:
        rows = [row for name in names if (row := findings.row("steps", name)) is not None]
        row = max(rows, key=lambda row: row.value, default=None)
        return None if row is None else Found(row.value, row)

    return figure


def _ways(name: str) -> list[str]:
    return [f"{name} graph", f"{name} eager"]


def _percent(share: float) -> float:
    return 100 * share


def _over(share: float) -> float:
    return 1 / share


def _floor_ms(branches: Sequence[int], eight_bit: bool = False) -> float:
    """As `Context.step_floor_ms`, at the rates that an H200 is said to have."""
    step = cost.step(branches, eight_bit)
    products, attention, _ = step.shares
    rate = _MATMUL_8_BIT if eight_bit else _MATMUL
    weights = 0.0243 / (2 if eight_bit else 1)
    return max(products.amount / rate + attention.amount / _MATMUL, weights / _COPY) * 1e3


def _share_target(
    what: str,
    limit: float,
    part: str,
    names: Sequence[str],
    branches: Sequence[int],
    eight_bit: bool = False,
) -> Target:
    step = cost.step(branches, eight_bit)
    figure = _share(part, names, _percent)
    estimated = 100 * _floor_ms(branches, eight_bit) / step.ms
    return Target(f"step {what}, share of its floor", limit, True, "%", figure, estimated, step)


def _over_target(
    what: str, limit: float, part: str, names: Sequence[str], branches: Sequence[int]
) -> Target:
    step = cost.step(branches)
    figure, estimated = _share(part, names, _over), step.ms / _floor_ms(branches)
    return Target(f"step {what}, over its floor", limit, False, "x", figure, estimated, step)


def _step_target(what: str, limit: float, names: Sequence[str], size: str) -> Target:
    step = cost.step([TOKENS[size]])
    return Target(f"step {what}", limit, False, "ms", _value("steps", *names), step.ms, step)


def _picture_target(
    what: str,
    limit: float,
    name: str,
    side: int,
    eight_bit: bool = False,
    fp8_attention: bool = False,
) -> Target:
    picture = cost.picture(side, eight_bit=eight_bit, fp8_attention=fp8_attention)
    figure = _value("pictures", name, scale=1e-3)
    return Target(f"picture {what}", limit, False, "s", figure, picture.ms / 1e3, picture)


def _decode_target(side: int, limit: float) -> Target:
    decode, size = cost.decode(side), f"{side}x{side}"
    # Not the searched one, which no server has.
    figure = _value("vae", f"{size} ours")
    return Target(f"VAE decode {size}", limit, False, "ms", figure, decode.ms, decode)


def _against_bf16(format: str, size: str, limit: float) -> Target:
    bf16, ours = (cost.step([TOKENS[size]], eight_bit).ms for eight_bit in (False, True))
    figure = _ratio(("steps", _ways(size)), ("steps", _ways(f"{size} {format}")))
    return Target(f"{format} against bf16, {size}", limit, True, "x", figure, bf16 / ours)


def _plain_target(size: str, limit: float) -> Target:
    figure = _ratio(("plain", [f"{size} plain"]), ("plain", _ways(size)))
    return Target(f"against plain PyTorch, {size}", limit, True, "x", figure)


def _adapter_target(size: str, limit: float) -> Target:
    beside = [f"{size} {WITH} graph", f"{size} {WITH} eager"]
    figure = _ratio(("adapters", beside), ("adapters", _ways(size)))
    return Target(f"step {size} {WITH}, against without", limit, False, "x", figure)


def _error(format: str) -> str:
    return f"{format} velocity 512x512, last step"


_TEXT, _1024, _2048 = cost.encode(), "1024x1024", "2048x2048"

TARGETS = (
    _share_target(f"{_1024}, bf16", 89, "steps", _ways(_1024), [4160]),
    _step_target(f"{_1024}, bf16", 160, _ways(_1024), _1024),
    _share_target(f"{_2048}, bf16", 88, "steps", _ways(_2048), [16448]),
    _step_target(f"{_2048}, bf16", 845, _ways(_2048), _2048),
    _share_target("512x512, graph", 80, "steps", ["512x512 graph"], [1088]),
    _step_target("512x512, graph", 39, ["512x512 graph"], "512x512"),
    _share_target("4 of 512x512, graph", 89, "packs", ["4 of 512x512 graph"], [1088] * 4),
    _over_target("256x256, graph", 1.3, "steps", ["256x256 graph"], [320]),
    _step_target("256x256, graph", 11.5, ["256x256 graph"], "256x256"),
    _over_target("8 of 256x256, graph", 1.15, "packs", ["8 of 256x256 graph"], [320] * 8),
    _plain_target(_1024, 1.3),
    _plain_target("256x256", 3),
    _adapter_target(_1024, 1.06),
    Target("against torch.compile, anywhere", 1, True, "x", _slowest_against_compiled),
    _against_bf16("fp8", _1024, 1.5),
    _against_bf16("fp8", _2048, 1.4),
    _against_bf16("int8", _1024, 1.5),
    _against_bf16("int8", _2048, 1.4),
    _share_target(f"{_1024}, int8", 80, "steps", _ways(f"{_1024} int8"), [4160], eight_bit=True),
    _share_target(f"{_2048}, int8", 80, "steps", _ways(f"{_2048} int8"), [16448], eight_bit=True),
    _picture_target(f"{_1024}, bf16", 1.37, f"{_1024} bf16", 1024),
    _picture_target(f"{_1024}, fp8", 0.90, f"{_1024} fp8", 1024, eight_bit=True),
    _picture_target(f"{_1024}, int8", 0.90, f"{_1024} int8", 1024, eight_bit=True),
    _picture_target(f"{_2048}, bf16", 7.0, f"{_2048} bf16", 2048),
    _picture_target(f"{_2048}, fp8", 5.0, f"{_2048} fp8", 2048, eight_bit=True),
    _picture_target(
        f"{_2048}, fp8 with fp8 attention",
        4.4,
        f"{_2048} fp8, fp8 attention",
        2048,
        eight_bit=True,
        fp8_attention=True,
    ),
    Target(
        "error of a step, int8 over fp8",
        0.5,
        False,
        "x",
        _ratio(("precision", [_error("int8")]), ("precision", [_error("fp8")])),
    ),
    _decode_target(1024, 40),
    _decode_target(2048, 150),
    Target(
        "VAE decode against the 3-D original, 1024x1024",
        3,
        True,
        "x",
        _ratio(("vae 3-D", [f"{_1024} 3-D original"]), ("vae 3-D", [f"{_1024} ours"])),
    ),
    Target(
        "text, a prompt of 100 words",
        10,
        False,
        "ms",
        _value("text", "100 words graph"),
        _TEXT.ms,
        _TEXT,
    ),
    Target(
        "host work per step while graphs replay",
        0.5,
        False,
        "ms",
        _largest(["256x256 host", "512x512 host"]),
    ),
    Target("host gap between steps", 0.1, False, "ms", _largest(["256x256 gap", "512x512 gap"])),
)
