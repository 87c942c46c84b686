"""Tables for docs/clients.md, from those by which the server reads requests."""

from itertools import groupby

from krea2_server.api.dialects import GUIDANCE_PLUS_ONE, NO_EFFECT, SYNONYMS


def synonyms_table() -> str:
    """Other words for our fields, a row for each field."""
    words: dict[str, list[str]] = {}
    for name, (field, whose) in SYNONYMS.items():
        words.setdefault(field, []).append(f"`{name}` ({whose})")
    for name, whose in GUIDANCE_PLUS_ONE.items():
        words.setdefault("guidance_scale", []).append(f"`{name}`, minus 1 ({whose})")
    lines = ["| field | also called |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{field}` | {', '.join(w)} |" for field, w in words.items())])


def no_effect_table() -> str:
    """Fields that have no effect, a row for each reason."""
    lines = ["| fields | why |", "| --- | --- |"]
    for reason, rows in groupby(NO_EFFECT.items(), lambda row: row[1].reason):
        lines.append(f"| {', '.join(f'`{name}`' for name, _ in rows)} | {reason} |")
    return "\n".join(lines)
