"""How the code speaks: see docs/glossary.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("krea2_srt", "server", "benchmarks", "tools", "tests")


def test_a_docstring_says_what_the_thing_is():
    """``Of a program.`` leaves the noun to the reader; ``Elements per program.`` does not."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 500
    found = {
        f"{file.relative_to(ROOT)}: {line}"
        for file in files
        for line in re.findall(r'""" ?Of [^\n]*', file.read_text(encoding="utf-8"))
    }
    assert found == set()
