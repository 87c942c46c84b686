"""How the code speaks: see docs/glossary.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("krea2_srt", "server", "benchmarks", "tools", "tests")


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    """Each file's text, by its path from the top."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


def test_a_docstring_says_what_the_thing_is(sources):
    """``Of a program.`` leaves the noun to the reader; ``Elements per program.`` does not."""
    assert len(sources) > 500
    found = {
        f"{file}: {line}"
        for file, text in sources.items()
        for line in re.findall(r'""" ?Of [^\n]*', text)
    }
    assert found == set()


FORMER = {
    "lane": "branch",
    "lanes": "branches",
    "Lanes": "ForwardBatch",
    "Drawing": "GenerateRequest",
    "Drawn": "ImageMetadata",
    "drawn": "generated",
    "Ticket": "Job.ahead",
    "held_steps": "paused_steps",
    "decodes_aside": "overlapped_decodes",
    "whole_schedules": "full_schedule_graphs",
    "set_apart": "isolate",
    "taps": "select_layers",
    "TokenRows": "SegmentIndex",
    "Recipe": "SamplingDefaults",
    "Wishes": "MemoryRequest",
    "Pace": "OnlineCalibration",
    "Ledger": "RequestTable",
    "Backlog": "OutstandingWork",
    "PackDraft": "PackBuilder",
    "NoEdits": "UnsupportedEndpoints",
    "Ending": "SignalHandler",
    "doubt": "mark_suspect",
    "foreign_ms": "other_routers_ms",
    "Player": "LoadRunner",
    "Painter": "ImageGenerator",
    "Lab": "Experiment",
    "Sketch": "Case",
}
"""Our former words, and the field's."""

# Random numbers and plots are drawn.
DRAWN = {"plotting.py", "plots.py", "traces.py", "statistics.py", "timeline.py", "plan.py"}


@pytest.mark.parametrize("word", FORMER)
def test_what_serves_speaks_the_fields_words(sources, word):
    pattern = re.compile(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])")
    found = [
        f"{file}: {line.strip()}"
        for file, text in sources.items()
        if file.parts[0] not in ("tests", "tools")
        if not (word == "drawn" and file.name in DRAWN)
        for line in text.split("\n")
        if pattern.search(line)
    ]
    assert found == [], f"the field says {FORMER[word]}"
