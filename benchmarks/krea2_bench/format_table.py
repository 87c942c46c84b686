"""The table of docs/checkpoints.md, from the formats that the reader knows."""

from krea2_srt.model.stored.formats import FORMATS


def format_table() -> str:
    """Formats of checkpoint files, and what happens to each."""
    rows = (f"| {format} | {happens} |" for format, happens in FORMATS.items())
    return "\n".join(["| format | what happens |", "| --- | --- |", *rows])
