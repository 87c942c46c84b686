"""The page of ``krea2-bench quality --sensitivity``, in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from krea2_bench.quality.sensitivity.rule import LEAST_DB, LEAST_RATIO, MOST_BYTES

Row = dict[str, Any]

_PAGE = """\
# What each matrix loses in 8 bits

`{command}`, {date}, {cpus} cores of {cpu}{gpus}: {prompts},
{size}, of a model with {blocks} blocks of width {width}, in {seconds} s.{about}

The error is that of the velocity, |v - v'| / |v|, on the same latents, root mean square over
prompts and steps; all but the 8-bit matrices is in float32. *alone*: only this matrix is in 8 bits.
*others*: all but this one are. *gain*: what share of the squared error of all goes away if this one
stays in 16 bits. *per byte*: that over its share of the blocks' bytes.

The rule: candidates have a gain per byte of at least {ratio:g}, and are taken best first while they
have at most {bytes:.0%} of the bytes. They stay in 16 bits if together they bring {db:g} dB; else
none does.
"""

_NOT_RELEASED = """

**These sizes are of no released model.** The figures say that the command works, and nothing of
Krea 2's own weights, which are not measured."""


def page(result: Row) -> str:
    """All tables, and what follows from them.

    Args:
        result: what the command writes as JSON.
    """
    run, model = result["run"], result["model"]
    about = _PAGE.format(
        command=run["command"],
        date=run["date"][:10],
        cpus=run["cpu_count"],
        cpu=run["cpu"],
        gpus="".join(f", {gpu}" for gpu in run["gpus"]),
        prompts=f"{result['prompts']} prompt{'s' if result['prompts'] > 1 else ''}",
        size=result["size"],
        blocks=model["blocks"],
        width=model["width"],
        seconds=result["seconds"],
        about="" if model["released_sizes"] else _NOT_RELEASED,
        ratio=LEAST_RATIO,
        bytes=MOST_BYTES,
        db=LEAST_DB,
    )
    return about + "".join(_section(its) for its in result["formats"])


def conclusion(found: Row) -> str:
    """What the rule says of a format, in a sentence or two."""
    names = found["candidates"]
    if not names:
        return "No matrix is a candidate: none stays in 16 bits."
    sizes = {row["name"]: row["bytes"] for row in found["matrices"]}
    about = (
        f"Candidates: {', '.join(names)}, with {sum(sizes[name] for name in names):.1%} of the "
        f"bytes. They bring {found['gain_db']:.2f} dB together"
    )
    if not found["kept"]:
        return f"{about}, less than {LEAST_DB:g}: none stays in 16 bits."
    listed = " ".join(f"'{name}'" for name in found["kept"])
    return f"{about}: `--quantization-ignored-layers {listed}`"


def _section(found: Row) -> str:
    rows = found["matrices"]
    total = sum(row["alone"] ** 2 for row in rows)
    matrices = [["matrix", "bytes", "alone", "others", "gain", "per byte"]]
    for row in rows:
        errors = [f"{row[name]:.3%}" for name in ("alone", "others")]
        gain = [f"{row['gain']:.1%}", f"{row['ratio']:.2f}"]
        matrices.append([row["name"], f"{row['bytes']:.2%}", *errors, *gain])

    def shares(title: str, of: Callable[[str], str]) -> str:
        lines = [[title, "bytes", "of the squared errors alone"]]
        for group in sorted({of(row["name"]) for row in rows}, key=_natural):
            its = [row for row in rows if of(row["name"]) == group]
            error = sum(row["alone"] ** 2 for row in its) / total
            lines.append([group, f"{sum(row['bytes'] for row in its):.1%}", f"{error:.1%}"])
        return _table(lines)

    steps = f"{len(found['steps'])} of {found['num_steps']} steps"
    return (
        f"\n## {found['format']}\n\n**{conclusion(found)}**\n\n"
        f"All matrices in 8 bits: {found['error']:.2%}, over {steps}. The root of the sum of the "
        f"squared errors alone: {total**0.5:.2%}.\n\n"
        f"{shares('kind', lambda name: name.partition('.')[2])}\n"
        f"{shares('block', lambda name: name.partition('.')[0])}\n"
        f"{_table(matrices)}"
    )


def _natural(group: str) -> tuple[int, str]:
    return (int(group) if group.isdecimal() else 0, group)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "|" + " --- |" * len(lines[0]))
    return "\n".join(rows) + "\n"
