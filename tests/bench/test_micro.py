"""krea2-bench micro: ratios, their history, and a check that fails when it should."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from krea2_bench.micro import command
from krea2_bench.micro.history import (
    KEPT,
    HistoryError,
    last_of,
    read_history,
    record,
    regressions,
)
from krea2_bench.micro.runner import packing
from krea2_bench.micro.scheduling import scheduler_turn
from krea2_bench.micro.timing import Timed, best_of, plain_python
from krea2_bench.provenance import cpu_name

Bench = Callable[..., int]


def test_a_ratio_is_that_of_the_quickest(monkeypatch):
    """What else runs on the machine only adds; the first call warms up, and does not count."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(*seconds: float) -> Callable[[], object]:
        left = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(left))

    found = best_of(takes(0.1, 5.0, 4.0, 7.0), takes(0.1, 1.0, 2.0, 9.0), rounds=3)
    assert found == pytest.approx((4e3, 1e3))


def test_plain_python_does_something():
    assert plain_python() > 0


def test_scheduling_and_packing_are_measured():
    found = [scheduler_turn(2), *packing(3)]
    assert [timed.name for timed in found] == [
        "scheduler turn",
        "new pack of 16 images",
        "known pack of 16 images",
    ]
    for timed in found:
        assert timed.ms > 0
        assert timed.ratio == timed.ms / timed.reference_ms


@pytest.mark.parametrize(
    ("found", "worse"),
    [
        ({"a": 1.0, "b": 2.0}, {}),
        ({"a": 1.149, "b": 0.1}, {}),
        ({"a": 1.16, "b": 2.0}, {"a": "1.16 in place of 1, +16%"}),
        ({"a": 1.0}, {"b": "is not measured any more"}),
        ({"a": 1.0, "b": 2.0, "c": 1.0}, {"c": "is not in the history; record it"}),
    ],
)
def test_a_ratio_may_be_worse_by_fifteen_percent(found, worse):
    assert regressions({"a": 1.0, "b": 2.0}, found, {}) == worse


@pytest.mark.parametrize(
    ("ratio", "worse"),
    [(4.9, {}), (5.1, {"c": "5.1, and must be at most 5"})],
)
def test_a_ratio_with_a_bound_needs_no_history(ratio, worse):
    assert regressions({"a": 1.0}, {"a": 1.0, "c": ratio}, {"c": 5.0}) == worse
    assert regressions({"a": 1.0, "c": 1.0}, {"a": 1.0, "c": ratio}, {"c": 5.0}) == worse


def test_a_machine_that_does_not_reach_a_bound_is_compared_with_itself():
    assert regressions({"c": 6.0}, {"c": 6.8}, {"c": 5.0}) == {}
    assert regressions({"c": 6.0}, {"c": 7.0}, {"c": 5.0}) == {"c": "7 in place of 6, +17%"}


def test_a_history_grows_at_its_end_and_is_not_endless(tmp_path: Path):
    file = tmp_path / "micro.json"
    for number in range(KEPT + 3):
        record(file, {"date": "today"}, [Timed("a", number, "b", 1.0)], {"start_up_s": {}})
    entries = read_history(file)
    assert len(entries) == KEPT
    assert entries[-1]["ratios"] == {"a": KEPT + 2}
    assert entries[-1]["references"] == {"a": "b"}


def test_an_entry_is_of_one_kind_of_processor():
    entries = [{"run": {"cpu": name}, "ratios": {}} for name in ("A", "B", "A", "C")]
    assert last_of(entries, "A") is entries[2]
    assert last_of(entries, "B") is entries[1]
    assert last_of(entries, "D") is None


@pytest.mark.parametrize("text", ["", "[]", '{"history": []}', '{"history": [{}]}'])
def test_what_is_no_history_is_named(tmp_path: Path, text: str):
    (tmp_path / "micro.json").write_text(text)
    with pytest.raises(HistoryError, match="is no history"):
        read_history(tmp_path / "micro.json")


class Attempts:
    """Parts that find given ratios to 1.0, one an attempt."""

    def __init__(self, monkeypatch, bench: Bench, demo_model: Path, **ratios: list[float]) -> None:
        self.made = dict.fromkeys(ratios, 0)
        self._ratios = ratios
        self._bench, self._demo_model = bench, demo_model
        monkeypatch.setattr(command, "PARTS", tuple(ratios))
        monkeypatch.setattr(command, "measure", self._measure)
        record(
            Path("micro.json"),
            {"cpu": cpu_name(), "date": "2026-11-25"},
            [Timed(name, 1.0, "b", 1.0) for name in ratios],
            {},
        )

    def _measure(self, _checkpoint: Path, _rounds: int, parts: list[str]) -> list[Timed]:
        (part,) = parts
        self.made[part] += 1
        return [Timed(part, self._ratios[part][self.made[part] - 1], "b", 1.0)]

    def check(self) -> int:
        """Exit code."""
        return self._bench("micro", "--checkpoint", str(self._demo_model), "--check", "micro.json")


def test_a_check_passes_at_the_first_good_attempt(bench, monkeypatch, demo_model):
    attempts = Attempts(monkeypatch, bench, demo_model, a=[1.1, 9])
    assert attempts.check() == 0
    assert attempts.made == {"a": 1}


def test_one_busy_moment_is_no_regression(bench, monkeypatch, demo_model):
    attempts = Attempts(monkeypatch, bench, demo_model, a=[1.5, 1.3, 1.1, 9])
    assert attempts.check() == 0
    assert attempts.made == {"a": 3}


def test_only_what_is_worse_is_measured_again(bench, monkeypatch, demo_model):
    attempts = Attempts(monkeypatch, bench, demo_model, a=[1.5, 1.1, 9], b=[1.0, 9])
    assert attempts.check() == 0
    assert attempts.made == {"a": 2, "b": 1}


def test_a_regression_fails(bench, monkeypatch, demo_model, capsys):
    found = [1.5, 1.3, 1.2, 1.4, *[1.5] * (command.ATTEMPTS - 4)]
    attempts = Attempts(monkeypatch, bench, demo_model, a=found)
    assert attempts.check() == 1
    assert attempts.made == {"a": command.ATTEMPTS}
    assert "REGRESSION a: 1.2 in place of 1, +20%" in capsys.readouterr().out


def test_a_processor_that_the_history_does_not_know_is_not_compared(
    bench, monkeypatch, demo_model, capsys
):
    monkeypatch.setattr(command, "measure", lambda *_: [Timed("a", 9.0, "b", 1.0)])
    record(Path("micro.json"), {"cpu": "another"}, [Timed("a", 1.0, "b", 1.0)], {})
    assert bench("micro", "--checkpoint", str(demo_model), "--check", "micro.json") == 0
    printed = capsys.readouterr().out
    assert f"no entry of a processor named {cpu_name()!r}" in printed
    assert "REGRESSION" not in printed


def test_a_ratio_to_something_else_is_not_compared(bench, monkeypatch, demo_model, capsys):
    monkeypatch.setattr(command, "measure", lambda *_: [Timed("a", 1.0, "c", 1.0)])
    record(Path("micro.json"), {"cpu": cpu_name()}, [Timed("a", 1.0, "b", 1.0)], {})
    assert bench("micro", "--checkpoint", str(demo_model), "--check", "micro.json") != 0
    error = capsys.readouterr().err
    assert "a is a ratio to b there, and to c now; record it again" in error
    assert len(error.splitlines()) == 1


def test_a_missing_checkpoint_is_one_line(bench, capsys):
    assert bench("micro", "--checkpoint", "missing") == 2
    assert "checkpoint folder missing does not exist" in capsys.readouterr().err
