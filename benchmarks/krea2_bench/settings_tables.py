"""Tables of settings for the docs, from where the settings are declared."""

from typing import Any

from krea2_srt.setting import Setting, settings_of


def settings_table(config: type[Any]) -> str:
    """The settings of a config, a row for each."""
    lines = ["| `KREA2_SRT_` … | default | may be | |", "| --- | --- | --- | --- |"]
    for name, declared in settings_of(config).items():
        cells = [f"`{name.upper()}`", declared.default_text, _values(declared), declared.help]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _values(declared: Setting) -> str:
    if declared.choices:
        choices = ", ".join(f"`{choice}`" for choice in declared.choices)
        return f"{choices}, whole, 0 or greater" if declared.or_count else choices
    whole = "whole, " if isinstance(declared.default, int) else ""
    if declared.above is not None:
        return f"{whole}above {declared.above:g}"
    if declared.least is not None:
        return f"{whole}{declared.least:g} or greater"
    return ""
