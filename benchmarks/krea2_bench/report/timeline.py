"""One run, drawn: every request as a bar of its stages, and the engine's packs underneath."""

from typing import Any

from krea2_bench.load.outcome import DONE, Outcome
from krea2_bench.plotting import INK, WORK, new_figure, shared_legend
from krea2_bench.report.data import Study, Turns

_STAGES = ("queue", "encode", "denoise", "decode")
_WORK_OF = {"queue": "queue", "encode": "encode", "denoise": "step", "decode": "decode"}
_MAX_REQUESTS = 60
_REST = "transfer"


def timeline(study: Study, side: str, point: int) -> Any | None:
    """The first round of a point, up to 60 requests.

    A server that tells no stages has plain bars. Stages of a request are told as lengths: they are
    drawn one behind the other from when it was sent; what is left is encoding and transfer.

    Args:
        study: with outcomes.
        side: of it.
        point: its number.

    Returns:
        None without outcomes.
    """
    lines = [line for line in study.outcomes.get(side, {}).get(point, []) if line.round == 0]
    outcomes = sorted((line.outcome for line in lines), key=lambda o: o.due_s)[:_MAX_REQUESTS]
    if not outcomes:
        return None
    turns = study.turns.get(side)
    height = 1.2 + 0.13 * len(outcomes)
    figure, panels = new_figure(2 if turns else 1, 1, (11.0, height + (2.2 if turns else 0)))
    if turns:
        panels[0].get_gridspec().set_height_ratios([height, 2.0])
        panels[1].sharex(panels[0])
    _draw_requests(panels[0], outcomes)
    end_s = max(o.done_s for o in outcomes)
    if turns:
        _draw_packs(panels[1], turns, lines[0].began_at, end_s)
        panels[1].set_xlabel("time, s")
    else:
        panels[0].set_xlabel("time, s")
    shared_legend(figure, panels[:1])
    return figure


def _draw_requests(axes: Any, outcomes: list[Outcome]) -> None:
    for row, outcome in enumerate(outcomes):
        start = outcome.sent_s
        for stage in _STAGES:
            length = outcome.stage_ms.get(stage, 0.0) / 1e3
            if length:
                work = _WORK_OF[stage]
                label = {"step": "steps"}.get(work, work)
                _bar(axes, row, start, length, WORK[work], label)
            start += length
        plain = not outcome.stage_ms
        colour, label = (WORK["step"], "request") if plain else (INK, _REST)
        if outcome.outcome != DONE:
            colour, label = INK, "without an image"
        alpha = 1.0 if plain and outcome.outcome == DONE else 0.35
        _bar(axes, row, start, max(0.0, outcome.done_s - start), colour, label, alpha)
        if outcome.sent_s - outcome.due_s > 0.01:
            _bar(axes, row, outcome.due_s, outcome.sent_s - outcome.due_s, INK, "sent late", 0.6)
    sizes = [f"{o.size}" for o in outcomes]
    axes.set_yticks(range(len(outcomes)), sizes, fontsize=6)
    axes.set_ylim(len(outcomes) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.grid(axis="x")


def _bar(
    axes: Any, row: int, start: float, length: float, colour: str, label: str, alpha: float = 1.0
) -> None:
    axes.barh(row, length, left=start, height=0.8, color=colour, alpha=alpha, label=label, lw=0)


def _draw_packs(axes: Any, turns: Turns, began_at: float, end_s: float) -> None:
    """Width: the time of a unit of work; height: the sequences in it."""
    for entry in turns.entries:
        start = entry["at"] - began_at
        if -0.1 <= start <= end_s:
            count = len(entry.get("sequences", entry.get("requests", ())))
            colour = WORK[entry["work"]]
            axes.bar(start, count, entry["ms"] / 1e3, align="edge", color=colour, lw=0)
    axes.set_ylabel("images in\na forward")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
