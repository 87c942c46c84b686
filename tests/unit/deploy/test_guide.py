"""docs/operations.md says what the code does."""

import re
from pathlib import Path

import pytest

from krea2_srt.engine.cost import roofline
from tests.e2e.drills.__main__ import DRILLS

GUIDE = (Path(__file__).parents[3] / "docs/operations.md").read_text()


def test_it_has_every_drill_with_its_promise():
    rows = {}
    for line in GUIDE.splitlines():
        if found := re.fullmatch(r"\| ([\w-]+)(?: \(.*?\))? \| (.+) \| (.+) \|", line):
            rows[found[1]] = found[2], found[3]
    for name, drill in DRILLS.items():
        assert rows[name] == (drill.breaks, drill.promise)


@pytest.mark.parametrize("side", [256, 512, 768, 1024, 1536, 2048])
def test_its_sizes_are_those_of_the_roofline(side):
    cost, tokens = roofline(), side * side // 256 + 100
    seconds = (8 * cost.step([tokens]) + cost.decode(side * side)) / 1e3
    (row,) = re.findall(rf"^\| {side}x{side} \| ([\d.]+) s \| ([\d.]+) \|$", GUIDE, re.M)
    assert [float(value) for value in row] == pytest.approx([seconds, 1 / seconds], rel=0.05)


def test_its_links_lead_somewhere():
    folder = Path(__file__).parents[3] / "docs"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", GUIDE):
        assert (folder / target).exists(), target
