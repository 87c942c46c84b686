"""How the code speaks: see docs/glossary.md."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.split()


@pytest.mark.skipif(not FILES, reason="no git here")
def test_a_docstring_says_what_the_thing_is():
    """``Of a program.`` leaves the noun to the reader; ``Elements per program.`` does not."""
    found = {
        f"{name}: {line}"
        for name in FILES
        for line in re.findall(r'""" ?Of [^\n]*', (ROOT / name).read_text(encoding="utf-8"))
    }
    assert found == set()
