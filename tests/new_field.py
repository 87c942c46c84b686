"""The example of docs/architecture.md, "How a field is added": what it changes in which files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

_PAGE = ROOT / "docs/architecture.md"
_BLOCK = re.compile(r"```diff\n--- (\S+)\n(.*?)```", re.DOTALL)


def changes() -> dict[str, list[tuple[str, str]]]:
    """By file: pieces of its text, and what takes their place."""
    _, _, section = _PAGE.read_text().partition("## How a field is added")
    found: dict[str, list[tuple[str, str]]] = {}
    for file, hunks in _BLOCK.findall(section):
        for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            found.setdefault(file, []).append((before, after))
    return found


def apply(root: Path) -> None:
    """Change the files below a folder; each piece must be there once."""
    for file, pieces in changes().items():
        text = (root / file).read_text()
        for before, after in pieces:
            assert text.count(before) == 1, f"{file} has this {text.count(before)} times: {before}"
            text = text.replace(before, after)
        (root / file).write_text(text)
