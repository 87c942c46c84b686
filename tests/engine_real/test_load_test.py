"""krea2-bench load on the real server: every step of every request is in the engine's turn log."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from krea2_bench.cli import main
from krea2_bench.load.outcome import DONE, Outcome
from krea2_bench.report.data import read_study


def test_a_load_test_finds_all_its_work_in_the_turn_log(
    real_server, turn_log, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = len(turn_log.read_bytes().splitlines())
    mix = "64x64:steps=3:weight=2,128x64:steps=2:n=2"
    flags = ["--url", real_server.url, "--mix", mix, "--rate=inf", "--requests=9"]
    with pytest.raises(SystemExit) as ended:
        main(["load", *flags, "--alone=1", "--stream", "--previews=1"])
    assert not ended.value.code
    outcomes = [
        Outcome.parse(line)[1] for line in Path("krea2-bench-load.jsonl").read_bytes().splitlines()
    ]
    assert [o.outcome for o in outcomes] == [DONE] * 9

    entries = [json.loads(line) for line in turn_log.read_bytes().splitlines()[before:]]
    steps: defaultdict[str, int] = defaultdict(int)
    sharing = 0
    for entry in entries:
        if entry["work"] == "step" and entry["blocks"][1] == entry["blocks"][2]:
            sharing = max(sharing, len(entry["sequences"]))
            for name, *_ in entry["sequences"]:
                steps[name.split("#")[0]] += entry["steps"]
    for outcome in outcomes:
        assert steps[outcome.request_id] == outcome.steps * outcome.n
        assert outcome.preview_s is not None
        assert 0 < outcome.preview_s < outcome.done_s
        assert sum(outcome.stage_ms.values()) / 1e3 <= outcome.latency_s
    assert sharing > 1

    Path("krea2-bench-load.turns.jsonl").write_bytes(turn_log.read_bytes())
    study = read_study(Path("krea2-bench-load"))
    header = study.turns["server"].header
    assert header["flops_per_token"] > 0
    assert header["weight_bytes"] > 0
    began_at = study.outcomes["server"][0][0].began_at
    ended_at = began_at + max(o.done_s for o in outcomes)
    of_this = [e for e in entries if e["work"] == "step" and e["at"] >= began_at]
    assert of_this
    assert all(entry["at"] < ended_at for entry in of_this)
