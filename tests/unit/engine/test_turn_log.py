"""The turn log: a line for each unit of work, and nothing that it does stops the engine."""

import json
from pathlib import Path

import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.lifecycle import State
from krea2_srt.engine.turn_log import TurnLog
from krea2_srt.errors import ConfigError
from krea2_srt.testing.fake_executor import FakeExecutor, VirtualClock
from tests.unit.engine.fakes import H200, image


def run(log: TurnLog) -> Engine:
    """Two images of three steps."""
    device = FakeExecutor(VirtualClock(), cost=None, full_schedule_graphs=True)
    engine = Engine(device, H200, EngineConfig(), turn_log=log)
    requests = [engine.submit(name, [image(256, 3)]) for name in ("a", "b")]
    while engine.turn() is not None:
        pass
    assert {request.state for request in requests} == {State.DONE}
    return engine


def test_every_unit_of_work_has_its_line(tmp_path: Path):
    file = tmp_path / "turns"
    log = TurnLog(file, {"device": "none"})
    engine = run(log)
    log.close()
    header, *lines = map(json.loads, file.read_text().splitlines())
    assert header == {"version": 1, "device": "none"}
    assert len(lines) == engine.counters.turns
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert all(line["ms"] >= 0 for line in lines)
    steps = [line for line in lines if line["work"] == "step"]
    done = {
        (name, step + i)
        for line in steps
        for name, _, step, _ in line["sequences"]
        for i in range(line["steps"])
    }
    assert done == {(name, step) for name in "ab" for step in range(3)}
    assert {tuple(line["blocks"]) for line in steps} == {(0, 28, 28)}
    encoded = [name for line in lines if line["work"] == "encode" for name in line["requests"]]
    assert sorted(encoded) == ["a", "b"]
    decoded = [line["sequences"][0][0] for line in lines if line["work"] == "decode"]
    assert sorted(decoded) == ["a", "b"]


def test_a_second_start_appends(tmp_path: Path):
    for _ in range(2):
        TurnLog(tmp_path / "turns", {}).close()
    assert (tmp_path / "turns").read_text() == '{"version":1}\n' * 2


def test_a_full_disk_does_not_stop_the_engine(caplog: pytest.LogCaptureFixture):
    """/dev/full takes no byte."""
    run(TurnLog(Path("/dev/full"), {}))
    assert caplog.text.count("no more is written") == 1


def test_a_file_that_cannot_be_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^turn_log: .*No such file or directory"):
        TurnLog(tmp_path / "missing" / "turns", {})
