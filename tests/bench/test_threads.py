"""Settings of the threads' waiting: what is measured in which order, and what comes of it."""

import argparse
import json
from contextlib import contextmanager

import pytest

from krea2_bench.micro import threads
from krea2_bench.threads import __main__ as command
from krea2_bench.threads import measure
from krea2_bench.threads.measure import BESIDE_SIDES, DEFAULT, OURS, Engines, Setting


class Scripted:
    """Takes the place of a process; says how long its pictures take.

    Args:
        name: of its entries in `asked`.
        asked: list that they are added to.
        ms: of each answer.
    """

    def __init__(self, name, asked, *ms):
        self._name, self._asked, self._ms = name, asked, iter(ms)

    def ask(self, question):
        self._asked.append((self._name, len(question.get("sides", ())) or question["busy"]))
        return {"ms": next(self._ms)} if "sides" in question else question


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(measure, "_SHARE_S", 0)


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("ours", None),
        ("default", {}),
        ("passive", {"OMP_WAIT_POLICY": "passive"}),
        ("5000", {"GOMP_SPINCOUNT": "5000"}),
    ],
)
def test_settings_by_name(text, variables):
    assert Setting.parse(text).variables == variables


@pytest.mark.parametrize("text", ["", "lazy", "-1", "1.5"])
def test_what_is_no_setting_is_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
        Setting.parse(text)


def test_the_mix_is_generated_in_turns_whose_order_alternates():
    asked = []
    children = {
        OURS: Scripted("ours", asked, 100, 110),
        DEFAULT: Scripted("default", asked, 80, 100),
    }
    engines = Engines(children, Scripted("neighbour", asked))
    engines.generate_mix(2)
    assert [name for name, _ in asked] == ["ours", "default", "default", "ours"]
    ratios = engines.times[OURS].mixed_ratios(engines.times[DEFAULT])
    assert ratios == pytest.approx([1.25, 1.1])


def test_pictures_are_generated_alone_and_beside_a_busy_neighbour():
    asked = []
    count = len(BESIDE_SIDES)
    times = [10.0] * count + [20.0] * (count - 1) + [70.0]
    engines = Engines({OURS: Scripted("ours", asked, *times)}, Scripted("neighbour", asked))
    engines.generate_beside([OURS], 1)
    singles = [("ours", 1)] * count
    assert asked == [*singles, ("neighbour", True), *singles, ("neighbour", False)]
    assert engines.times[OURS].alone_ms == 10
    assert engines.times[OURS].slowest == [7]


@contextmanager
def scripted_engines(folder, checkpoint, settings):
    """Ours takes 2 % longer than libgomp's own waiting, and 3 times as long beside others."""
    count = len(BESIDE_SIDES)
    children = {
        setting: Scripted("", [], *(mix if setting is settings[0] else other))
        for setting in settings
        for mix, other in [
            ([102] * 3 + threads.BESIDE_ROUNDS * ([10] * count + [30] * count), [100] * 3)
        ]
    }
    yield Engines(children, Scripted("", []))


def test_both_ratios_have_bounds_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "running_engines", scripted_engines)
    beside, mixed = threads.waiting(tmp_path, tmp_path, 3)
    assert (beside.ratio, beside.bound) == (3, 6)
    assert (mixed.ratio, mixed.bound) == (pytest.approx(1.02), pytest.approx(1.0417, abs=1e-4))


@pytest.mark.slow
def test_the_command_compares_real_processes(demo_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "MIXED_SIDES", (64, 32))
    monkeypatch.setattr(measure, "BESIDE_SIDES", (32, 32))
    flags = ["--settings", "default,ours", "--rounds", "2", "--beside-rounds", "1"]
    assert command.main(["--model", str(demo_model), "--output", str(tmp_path), *flags]) == 0
    found = json.loads((tmp_path / "threads.json").read_text())["settings"]
    assert [each["name"] for each in found] == ["default", "ours"]
    assert found[0]["throughputs"] == [1, 1]
    assert all(each["alone_ms"] > 0 and each["slowest"][0] > 0 for each in found)
    page = (tmp_path / "threads.md").read_text()
    assert page in capsys.readouterr().out
    assert "| ours | " in page


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--model", str(tmp_path / "missing")])
    assert ended.value.code == 2
    assert "missing does not exist" in capsys.readouterr().err
