"""How near each step comes to what the hardware can do."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from krea2_bench.plotting import INK, SERIES, new_figure, plain_numbers
from krea2_bench.report.data import Study, Turns


@dataclass(frozen=True)
class Ceilings:
    """The most that the machine does: of a large matrix product, and of a large copy."""

    tflops: float
    gbytes_per_s: float

    def floor_ms(self, header: dict[str, Any], entry: dict[str, Any]) -> float:
        """The least time of a step, or of a slice of one, whatever runs it."""
        branches = [tokens for _, _, _, own in entry["sequences"] for tokens in own]
        flops = header["flops_per_token"] * sum(branches)
        flops += header["flops_per_squared_token"] * sum(tokens * tokens for tokens in branches)
        arithmetic_ms = flops / self.tflops / 1e9
        weights_ms = header["weight_bytes"] / self.gbytes_per_s / 1e6
        start, end, total = entry["blocks"]
        return max(arithmetic_ms, weights_ms) * entry["steps"] * (end - start) / total


def shares(turns: Turns, ceilings: Ceilings) -> dict[int, list[float]]:
    """Shares of the floor in the time of steps, by the tokens of their packs."""
    found = defaultdict(list)
    for entry in turns.entries:
        if entry["work"] == "step" and entry["ms"] > 0:
            tokens = sum(sum(own) for _, _, _, own in entry["sequences"])
            found[tokens].append(ceilings.floor_ms(turns.header, entry) / entry["ms"])
    return dict(found)


def share_of_the_floor(study: Study, side: str) -> Any | None:
    """Floor / time of every step against the tokens of its pack; None without log or ceilings."""
    turns, measured = study.turns.get(side), study.summary.get("ceilings")
    if turns is None or not measured or not (found := shares(turns, Ceilings(**measured))):
        return None
    figure, (axes,) = new_figure(1, 1, (8.0, 3.8))
    tokens = [count for count, values in found.items() for _ in values]
    values = [100 * value for some in found.values() for value in some]
    axes.plot(tokens, values, ".", ms=3, alpha=0.35, color=SERIES[0]["color"], label="a step")
    edges = np.geomspace(min(tokens), max(tokens) + 1, 13)
    places = np.digitize(tokens, edges)
    middles = [(i, np.flatnonzero(places == i)) for i in range(1, len(edges))]
    line = [
        (float(np.sqrt(edges[i - 1] * edges[i])), float(np.median(np.array(values)[chosen])))
        for i, chosen in middles
        if len(chosen)
    ]
    style = SERIES[1]
    axes.plot(*zip(*line, strict=True), lw=1.8, ms=4, label="median", **style)
    axes.axhline(100, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="tokens of the pack", ylabel="floor / time, %", xscale="log", ylim=(0, 105))
    plain_numbers(axes.xaxis)
    axes.grid()
    axes.legend()
    return figure
