"""krea2-bench compare: equal servers are equal, slower ones are slower, wrong pictures show."""

import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from krea2_bench.compare import servers
from krea2_bench.compare.figures import compare_points, latency_of_a_request
from krea2_bench.compare.pictures import compare_pictures, psnr
from krea2_bench.compare.servers import PRESETS, ServerError, parse_server
from krea2_bench.compare.statistics import compare_differences, compare_ratios, mean
from krea2_bench.load.outcome import DONE, FAILED, Outcome
from krea2_bench.load.summary import Slo
from tests.bench.fake_server import Fake
from tests.bench.virtual_time import VirtualServer
from tests.channel import wait_until

Bench = Callable[..., int]
SEEDS = range(20)
BENCH = Path(sys.executable).parent / "krea2-bench"


def outcome(index: int, latency_s: float, size: str = "64x64", end: str = DONE) -> Outcome:
    return Outcome(
        index, size, size, 0.004, 1, 8, 0, index, 10, 0.1 * index, 0.1 * index,
        0.1 * index + latency_s, outcome=end,
    )  # fmt: skip


def rounds(
    rng: np.random.Generator, slower: float = 1.0, count: int = 5, requests: int = 40
) -> list[list[Outcome]]:
    """As measured: requests that differ 2x, noise of 10 % each, and of 1.5 % for a whole round."""
    shape = np.random.default_rng(1).lognormal(0.0, 0.7, requests)
    found = []
    for _ in range(count):
        noise = rng.normal(1.0, 0.1, requests).clip(0.5) * rng.normal(1.0, 0.015)
        found.append([outcome(i, t) for i, t in enumerate((slower * shape * noise).tolist())])
    return found


def verdicts(slower: float) -> list[str]:
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        found.append(latency_of_a_request([(rounds(rng, slower), rounds(rng))]).verdict)
    return found


def test_equal_sides_show_no_difference():
    assert verdicts(1.0).count("no difference") >= 19


@pytest.mark.parametrize(("slower", "verdict"), [(1.1, "worse"), (0.9, "better")])
@pytest.mark.slow
def test_a_difference_of_a_tenth_is_seen(slower, verdict):
    assert verdicts(slower).count(verdict) >= 19


def test_a_single_round_the_other_way_is_no_difference():
    """However many requests say so: the machine may have been busy."""
    low, high = np.full(1000, 0.9), np.full(1000, 1.1)
    ones = np.ones(1000)
    found = compare_ratios([(low, ones)] * 9 + [(high, ones)], mean)
    assert found is not None
    assert not found.real
    assert compare_ratios([(low, ones)] * 10, mean).real


def test_two_rounds_say_nothing():
    found = compare_ratios([(np.full(9, 0.5), np.ones(9))] * 2, mean)
    assert found is not None
    assert (found.value, found.low, found.real) == (0.5, None, False)


@pytest.mark.slow
def test_an_interval_holds_the_truth_as_often_as_it_says():
    """99 %: of 60 experiments, at most two miss."""
    missed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = [(rng.lognormal(0.2, 0.3, 12), rng.lognormal(0.0, 0.3, 12)) for _ in range(5)]
        found = compare_ratios(pairs, lambda v: np.exp(np.log(v).mean(axis=-1)))
        assert found is not None
        assert found.low is not None
        missed += not found.low <= math.exp(0.2) <= found.high
    assert missed <= 2


def test_differences_may_be_of_zeros():
    zeros, ones = np.zeros(20), np.ones(20)
    found = compare_differences([(ones, zeros)] * 3, mean)
    assert (found.value, found.low, found.high, found.real) == (1.0, 1.0, 1.0, True)
    assert not compare_differences([(zeros, zeros)] * 3, mean).real


def test_only_what_both_sides_have_done_is_compared():
    """A side that fails its slow requests gains nothing in latency, and loses what is in time."""
    ours = [[outcome(i, 1.0) for i in range(10)] for _ in range(3)]
    theirs = [[replace(o, outcome=FAILED) if o.index < 5 else o for o in r] for r in ours]
    figures = compare_points(ours, theirs, Slo({"64x64": 2.0}))
    by_name = {figure.name: figure for figure in figures}
    assert by_name["mean latency"].interval.value == 1.0
    assert by_name["mean latency"].verdict == "no difference"
    assert by_name["share in time"].interval.value == 0.5
    assert by_name["share in time"].verdict == "better"


def test_a_side_without_an_answer_is_unknown():
    ours = [[outcome(i, 1.0) for i in range(10)] for _ in range(3)]
    theirs = [[outcome(i, 1.0, end=FAILED) for i in range(10)] for _ in range(3)]
    verdicts = {f.name: f.verdict for f in compare_points(ours, theirs, Slo({}))}
    assert set(verdicts.values()) == {"unknown"}


def test_psnr_by_its_formula():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == 0
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)


def test_pictures_are_compared_by_request():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 9, np.uint8)
    found = compare_pictures({1: [black], 2: [black], 3: [black]}, {2: [black], 3: [grey]}, 40.0)
    assert (found["compared"], found["equal"], found["different"]) == (2, 1, 1)
    assert found["psnr_min"] == found["psnr_median"] == pytest.approx(29.05, abs=0.01)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("theirs", "is neither NAME=COMMAND nor one of ours, sglang"),
        ("a b=serve {port}", "is no name"),
        ("a=", "has no command"),
        ("a=X=1", "has no command"),
        ("a=serve --port 1", "has no {port}"),
        ("a=serve 'x {port}", "No closing quotation"),
    ],
)
def test_servers_that_cannot_be(text, error):
    with pytest.raises(ServerError, match=error.replace("{", r"\{")):
        parse_server(text)


def test_servers_are_commands_with_variables_or_urls():
    assert parse_server("a=https://x.org/v1/").url == "https://x.org"
    found = parse_server("sglang")
    assert found.environment == {"KREA2_SRT": "off"}
    assert found.command[:2] == ("sglang", "serve")
    assert found.typed == PRESETS["sglang"]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on a virtual clock are there while it runs, and not before."""
    monkeypatch.setattr(servers, "_ready", lambda url: True)


def compare(bench: Bench, *servers: str, seed: int = 0, more: tuple[str, ...] = ()) -> dict:
    flags = [f"--server={server}" for server in servers]
    flags += ["--mix=64x64", "--concurrency=4", "--requests=16", "--alone=1", f"--seed={seed}"]
    assert bench("compare", *flags, *more) == 0
    return json.loads(Path("krea2-bench-compare.json").read_text())


def script(fake: Fake | VirtualServer, slower: float = 1.0) -> None:
    """40 to 80 ms by the request's seed."""
    fake.script({"wait_s": 0.04 * slower, "per_seed_s": 0.04 * slower})


def test_equal_servers_are_equal(
    ready, fake: VirtualServer, other: VirtualServer, bench: Bench, capsys
):
    script(fake)
    script(other)
    result = compare(bench, f"a={fake.url}", f"b={other.url}")
    assert result["complete"]
    assert result["rounds"] == 5
    assert result["overall"]["a"]["verdict"] == "no difference"
    assert result["pictures"]["a"] == {
        "compared": 16, "equal": 16, "different": 0, "min_psnr": 40.0,
        "psnr_min": None, "psnr_median": None,
    }  # fmt: skip
    assert "a and b: no difference" in capsys.readouterr().out
    # Both got the same requests, and not the same ones in every round.
    seen = [
        {(f["seed"], f["prompt"]) for f in server.statistics["seen"]} for server in (fake, other)
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) > 5 * 16


def test_a_server_slowed_by_a_tenth_is_slower(
    ready, fake: VirtualServer, other: VirtualServer, bench: Bench, capsys
):
    script(fake, 1.1)
    script(other)
    result = compare(bench, f"a={fake.url}", f"b={other.url}")
    assert result["overall"]["a"]["verdict"] == "worse"
    assert result["overall"]["a"]["interval"]["value"] == pytest.approx(1.1, abs=1e-4)
    assert "a is worse: a request takes 1." in capsys.readouterr().out


@pytest.mark.slow
def test_servers_are_started_and_ended(bench: Bench, capsys):
    """One at a time, from commands; the second draws other pictures, the third is the baseline."""
    python = shlex.quote(sys.executable)
    scripts = {"a": {"wait_s": 0.02}, "b": {"wait_s": 0.01}}
    servers = [
        f"{name}=WHAT=ever {python} -m tests.bench.fake_server {{port}} "
        + shlex.quote(json.dumps([actions]))
        for name, actions in scripts.items()
    ]
    flags = ["--one-at-a-time", "--rounds=3", "--load=0.5,2"]
    result = compare_rates(bench, *servers, more=flags)
    assert [point["load"] for point in result["points"]] == [0.5, 2]
    capacity = 1 / result["servers"]["b"]["alone_s"]["64x64"]
    assert result["points"][1]["rate"] == pytest.approx(2 * capacity, rel=0.01)
    assert result["servers"]["a"]["command"].startswith("WHAT=ever ")
    for point in result["points"]:
        assert point["sides"]["a"]["done"] == point["sides"]["b"]["done"] == 3 * 8


def compare_rates(bench: Bench, *servers: str, more: list[str]) -> dict:
    flags = [f"--server={server}" for server in servers]
    flags += ["--mix=64x64", "--requests=8", "--alone=1"]
    assert bench("compare", *flags, *more) == 0
    return json.loads(Path("krea2-bench-compare.json").read_text())


def test_wrong_pictures_show(
    ready, fake: VirtualServer, other: VirtualServer, bench: Bench, capsys
):
    fake.script({"shade": 60, "wait_s": 0.01})
    other.script({"wait_s": 0.01})
    result = compare(bench, f"a={fake.url}", f"b={other.url}", more=("--rounds=1",))
    assert result["pictures"]["a"]["different"] == 16
    assert "16 ARE DIFFERENT PICTURES" in capsys.readouterr().out
    assert result["overall"]["a"]["verdict"] == "unknown"


def test_several_mixes_have_results_of_their_own(
    ready, fake: VirtualServer, other: VirtualServer, bench: Bench
):
    script(fake)
    script(other)
    flags = [f"--server=a={fake.url}", f"--server=b={other.url}", "--rounds=1", "--requests=4"]
    flags += ["--mix=small=64x64", "--mix=wide=96x64:n=2", "--concurrency=2", "--alone=1"]
    assert bench("compare", *flags, "--output", "out") == 0
    for name, size in (("small", "64x64"), ("wide", "96x64")):
        result = json.loads(Path(f"out.{name}.json").read_text())
        assert result["run"]["mix"] == {size + (" n=2" if name == "wide" else ""): 1.0}
        assert result["points"][0]["sides"]["a"]["done"] == 4
        assert len(Path(f"out.{name}.jsonl").read_bytes().splitlines()) == 8


def test_a_server_that_dies_leaves_the_rounds_before(fake_process: Fake, bench: Bench, capsys):
    """It dies within the fourth round, whose failures are told; a fifth is not possible."""
    script(fake_process)
    actions = json.dumps([{"wait_s": 0.01}])
    python = shlex.quote(sys.executable)
    mortal = f"b={python} -m tests.bench.fake_server {{port}} '{actions}' 30"
    flags = [
        f"--server=a={fake_process.url}",
        f"--server={mortal}",
        "--mix=64x64",
        "--concurrency=4",
    ]
    flags += ["--requests=8", "--alone=1", "--rounds=9"]
    assert bench("compare", *flags) == 2
    result = json.loads(Path("krea2-bench-compare.json").read_text())
    assert not result["complete"]
    assert result["rounds"] == 4
    (point,) = result["points"]
    assert point["sides"]["a"]["done"] == 4 * 8
    assert point["sides"]["b"]["done"] + point["sides"]["b"]["failed"] == 4 * 8
    assert 0 < point["sides"]["b"]["failed"] <= 8  # of the round, and those in flight
    captured = capsys.readouterr()
    assert "no server answers" in captured.err
    assert "b: of 32 requests" in captured.out


@pytest.mark.slow
def test_interrupts_leave_the_rounds_before(fake_process: Fake, tmp_path: Path):
    script(fake_process)
    flags = [
        f"--server=a={fake_process.url}",
        f"--server=b={fake_process.url}",
        "--mix=64x64",
        "--rounds=999",
    ]
    command = [BENCH, "compare", *flags, "--concurrency=4", "--requests=8", "--alone=1"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # Three rounds of both, and what each drew alone.
        wait_until(lambda: len(fake_process.statistics["seen"]) > 3 * 2 * 8 + 20)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    result = json.loads((tmp_path / "krea2-bench-compare.json").read_text())
    assert not result["complete"]
    assert result["rounds"] >= 3
    assert "a and b: " in out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--server=ours"], "give two or more"),
        (["--server=a={url}", "--server=a={url}"], "two are called a"),
        (["--server=a={url}", "--server=b={url}", "--one-at-a-time"], "cannot be stopped"),
        (["--server=a={url}", "--server=b={url}", "--mix=x"], "begins with no size"),
        (["--server=a={url}", "--server=b={url}", "--load=1", "--rate=1"], "only one of them"),
        (["--server=a={url}", "--server=b={url}", "--mix=a=64x64", "--mix=8x8"], "needs a name"),
        (["--server=a={url}", "--server=b={url}", "--mix=a=8x8", "--mix=a=9x9"], "the same name"),
        (["--server=a={url}", "--server=b=http://127.0.0.1:9"], "b: no server answers"),
        (["--server=a={url}", "--server=b=no-such-command {{port}}"], "no-such-command: No such"),
        (["--server=a={url}", "--server=b=false {{port}}"], "b failed"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    fake_process: Fake, bench: Bench, capsys, flags, error
):
    fake_process.script({})
    assert bench("compare", *(flag.format(url=fake_process.url) for flag in flags)) == 2
    found = [line for line in capsys.readouterr().err.splitlines() if "waiting" not in line]
    assert error in found[0]
    assert not Path("krea2-bench-compare.json").exists()
