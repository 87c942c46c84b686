"""krea2-bench load against a server whose latencies, errors and stalls are known."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from krea2_bench.load.outcome import Outcome
from krea2_bench.percentiles import percentile
from tests.bench.fake_server import MODEL, Fake, fake_server
from tests.bench.virtual_time import VirtualServer
from tests.channel import wait_until

Bench = Callable[..., int]
BENCH = Path(sys.executable).parent / "krea2-bench"
SMALL = "--mix=64x64"
ROUNDING_S = 1e-4


def results(name: str = "krea2-bench-load") -> tuple[dict, list[Outcome]]:
    summary = json.loads(Path(f"{name}.json").read_text())
    lines = Path(f"{name}.jsonl").read_bytes().splitlines()
    return summary, [Outcome.parse(line)[1] for line in lines]


def quick(fake: Fake | VirtualServer, *more: str) -> list[str]:
    """A load test without warm-up."""
    mix = [] if "--mix" in more else [SMALL]
    return ["load", "--url", fake.url, *mix, "--warm-up=0", "--alone=0", *more]


def check(latency: dict, true: list[float]) -> None:
    """Every figure is the true one."""
    assert latency["count"] == len(true)
    assert latency["mean"] == pytest.approx(sum(true) / len(true), abs=ROUNDING_S)
    for q in (50, 90, 95, 99):
        assert latency[f"p{q}"] == pytest.approx(percentile(true, q), abs=ROUNDING_S)


def test_percentiles_are_the_true_ones(fake: VirtualServer, bench: Bench):
    """Many at once, answered after known times."""
    waits = [1.0 + 0.01 * i for i in range(100)]
    fake.script(*({"wait_s": wait} for wait in waits))
    assert bench(*quick(fake, "--rate=40", "--requests=100")) == 0
    summary, outcomes = results()
    assert summary["complete"]
    assert summary["run"]["model"] == MODEL
    for point in summary["points"]:
        check(point["latency_s"]["all"], waits)
        check(point["latency_s"]["64x64"], waits)
        assert (point["done"], point["error_rate"], point["rejection_rate"]) == (100, 0, 0)
    assert len(outcomes) == 100
    assert {o.outcome for o in outcomes} == {"done"}


def test_latency_counts_from_when_a_request_was_due(fake: VirtualServer, bench: Bench):
    """One at a time, 0.3 s each, while twenty a second come: the queue grows by arithmetic."""
    fake.script({"wait_s": 0.3, "serial": True})
    assert bench(*quick(fake, "--rate=20", "--arrivals=constant", "--requests=10")) == 0
    summary, outcomes = results()
    check(summary["points"][0]["latency_s"]["all"], [0.3 * (k + 1) - 0.05 * k for k in range(10)])
    assert [o.due_s for o in outcomes] == pytest.approx([0.05 * k for k in range(10)])


def test_a_server_that_stalls_cannot_hide_behind_its_client(fake: VirtualServer, bench: Bench):
    """It is deaf for a second; whoever was due meanwhile waits for the rest of it."""
    fake.script(*({"wait_s": 0.5, "block_s": 1.0 * (i == 10)} for i in range(40)))
    assert bench(*quick(fake, "--rate=20", "--arrivals=constant", "--requests=40")) == 0
    (point,) = results()[0]["points"]
    # Those under way at second 0.5 answer late too: their clocks had run out meanwhile.
    start, end = 0.5, 1.5
    true = []
    for k in range(40):
        due = 0.05 * k
        begins = max(due, end) if due >= start else due
        ready = begins + 0.5 if k != 10 else end + 0.5
        true.append((end if start < ready < end else ready) - due)
    # A client that waits with its clock stopped would say 0.5 to 0.6.
    check(point["latency_s"]["all"], true)
    assert max(true) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ({"break": "png"}, "broken image"),
        ({"break": "base64"}, "broken image"),
        ({"break": "size"}, "image of 80x64 in place of 64x64"),
        ({"break": "count"}, "0 images in place of 1"),
        ({"break": "json"}, "no JSON object"),
        ({"break": "disconnect"}, "connection: "),
        ({"status": 500}, "500 internal_error"),
        ({"wait_s": 5}, "timeout"),
    ],
)
def test_what_is_no_picture_is_an_error(
    fake: VirtualServer, bench: Bench, action: dict, error: str
):
    fake.script({}, {}, {}, action)
    assert bench(*quick(fake, "--concurrency=4", "--requests=20", "--timeout-s=1")) == 0
    (point,) = results()[0]["points"]
    assert (point["done"], point["failed"]) == (15, 5)
    assert point["error_rate"] == 0.25
    assert sum(count for text, count in point["errors"].items() if error in text) == 5
    assert point["latency_s"]["all"]["count"] == 15


def test_refusals_are_counted_by_themselves(fake_process: Fake, bench: Bench):
    fake_process.script({}, {"status": 429})
    assert bench(*quick(fake_process, "--concurrency=1", "--requests=10")) == 0
    (point,) = results()[0]["points"]
    assert (point["done"], point["rejected"], point["failed"]) == (5, 5, 0)
    assert (point["rejection_rate"], point["error_rate"]) == (0.5, 0.0)


def test_goodput_counts_what_is_in_time(fake: VirtualServer, bench: Bench):
    """Alone 0.1 s, so in time within 0.3; half of the requests take 0.2, half 0.5."""
    alone = [{"wait_s": 0.1}] * 4
    fake.script(*alone, *[{"wait_s": 0.2}, {"wait_s": 0.5}] * 10)
    assert bench("load", "--url", fake.url, SMALL, "--rate=20", "--requests=20") == 0
    summary, _ = results()
    (point,) = summary["points"]
    assert summary["alone_s"]["64x64"] == pytest.approx(0.1, abs=ROUNDING_S)
    assert point["slo_attainment"] == 0.5
    assert point["goodput_per_s"] == pytest.approx(point["request_throughput"] / 2, rel=1e-3)


def test_an_absolute_objective_needs_no_time_alone(fake: VirtualServer, bench: Bench):
    fake.script({"wait_s": 0.1}, {"wait_s": 0.3})
    assert bench(*quick(fake, "--concurrency=1", "--requests=4", "--slo-s=0.2")) == 0
    summary, _ = results()
    assert summary["slo_s"] == {"64x64": 0.2}
    assert summary["points"][0]["slo_attainment"] == 0.5


def test_a_closed_loop_keeps_its_number_of_clients_busy(fake: VirtualServer, bench: Bench):
    fake.script({"wait_s": 0.1})
    assert bench(*quick(fake, "--concurrency=4", "--requests=20")) == 0
    (point,) = results()[0]["points"]
    assert fake.statistics["most_in_flight"] == 4
    # Five rounds of 0.1 s; three busy clients would need seven.
    assert point["seconds"] == pytest.approx(0.5, abs=ROUNDING_S)
    assert point["images_per_s"] == pytest.approx(20 / point["seconds"], rel=0.01)


def test_mixes_have_their_shares_and_fields(fake_process: Fake, bench: Bench):
    fake_process.script({})
    mix = "64x64:steps=4:priority=3:prompt=3-9:weight=3, 32x96:n=2:prompt=200-500:weight=1"
    flags = ["--mix", mix, "--concurrency=4", "--requests=40", "--extra", '{"user": "me"}']
    assert bench(*quick(fake_process, *flags, "--omit=response_format")) == 0
    seen = fake_process.statistics["seen"]
    small = [fields for fields in seen if fields["size"] == "64x64"]
    large = [fields for fields in seen if fields["size"] == "32x96"]
    assert (len(small), len(large)) == (30, 10)
    for fields in seen:
        assert fields["user"] == "me"
        assert fields["model"] == MODEL
        assert "response_format" not in fields
        assert "stream" not in fields
    assert {(f["num_inference_steps"], f["priority"], f["n"]) for f in small} == {(4, 3, 1)}
    assert all("num_inference_steps" not in f and "priority" not in f for f in large)
    assert {f["n"] for f in large} == {2}
    assert max(len(f["prompt"]) for f in small) < min(len(f["prompt"].encode()) for f in large)
    assert len({f["seed"] for f in seen}) == 40
    _, outcomes = results()
    assert {o.prompt_tokens <= 9 for o in outcomes if o.size == "64x64"} == {True}
    (point,) = results()[0]["points"]
    assert list(point["latency_s"]) == ["all", "32x96", "64x64"]
    assert point["images_per_s"] == pytest.approx(50 / 40 * point["request_throughput"], rel=1e-3)


def test_the_same_seed_sends_the_same_requests(fake: VirtualServer, bench: Bench):
    seen = []
    for seed in ("1", "1", "2"):
        fake.script({})
        assert bench(*quick(fake, "--rate=inf", "--requests=12", "--seed", seed)) == 0
        seen.append(sorted((f["seed"], f["prompt"]) for f in fake.statistics["seen"]))
    assert seen[0] == seen[1] != seen[2]


def test_streams_have_a_time_to_the_first_preview(fake: VirtualServer, bench: Bench):
    fake.script({"wait_s": 0.9})
    flags = ["--stream", "--previews=2", "--rate=inf", "--requests=4"]
    assert bench(*quick(fake, *flags)) == 0
    (point,) = results()[0]["points"]
    assert point["done"] == 4
    assert point["preview_s"]["p50"] == pytest.approx(0.3, abs=ROUNDING_S)
    assert point["latency_s"]["all"]["p50"] == pytest.approx(0.9, abs=ROUNDING_S)
    assert point["queue_s"]["p50"] == pytest.approx(0.1)


def test_clients_that_hang_up_are_no_errors(fake: VirtualServer, bench: Bench):
    fake.script({"wait_s": 0.5})
    flags = ["--cancel-rate=0.5", "--cancel-after-s=0.05", "--rate=inf", "--requests=40"]
    assert bench(*quick(fake, *flags)) == 0
    (point,) = results()[0]["points"]
    assert point["cancelled"] == fake.statistics["hung_up"] > 5
    assert point["done"] == 40 - point["cancelled"] > 10
    assert point["error_rate"] == 0


def test_a_trace_is_replayed(fake: VirtualServer, bench: Bench, tmp_path: Path):
    fake.script({"wait_s": 0.2})
    lines = [
        {"time_s": 5.0, "width": 64, "height": 64, "steps": 4, "num_images": 2, "text_tokens": 9},
        {"time_s": 6.0, "width": 96, "height": 32},
    ]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--url", fake.url, "--trace", "trace", "--trace-speed=2", "--warm-up=0", "--alone=1"]
    assert bench("load", *flags) == 0
    summary, outcomes = results()
    assert [(o.due_s, o.size, o.n, o.steps) for o in outcomes] == [
        (0.0, "64x64", 2, 4),
        (0.5, "96x32", 1, 8),
    ]
    assert summary["points"][0]["arrivals"] == "trace"


def test_interrupts_leave_a_valid_partial_report(fake_process: Fake, tmp_path: Path):
    fake_process.script({"wait_s": 0.2})
    command = [BENCH, *quick(fake_process, "--rate=10,20", "--requests=1000")]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: len(fake_process.statistics["seen"]) >= 10)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "10/s" in out
    summary = json.loads((tmp_path / "krea2-bench-load.json").read_text())
    lines = (tmp_path / "krea2-bench-load.jsonl").read_bytes().splitlines()
    assert not summary["complete"]
    (point,) = summary["points"]
    assert point["done"] > 0
    assert point["interrupted"] > 0
    assert point["requests"] == len(lines) == point["done"] + point["interrupted"]
    assert point["latency_s"]["all"]["count"] == point["done"]


def test_a_server_that_dies_ends_no_load_test(bench: Bench, tmp_path: Path):
    with fake_server() as mortal:
        mortal.script({"break": "disconnect"})
        assert bench(*quick(mortal, "--concurrency=2", "--requests=6")) == 0
    (point,) = results()[0]["points"]
    assert point["failed"] == 6
    assert point["latency_s"]["all"] is None


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--url=http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--url=nonsense"], "must begin with http://"),
        (["--mix=big"], "'big' begins with no size"),
        (["--mix=64x64:steps=0"], "'steps=0' of '64x64:steps=0': must be a whole number from 1"),
        (["--mix=64x64:colour=red"], "'colour=red' of '64x64:colour=red' is not known"),
        (["--mix=64x64:weight=-1"], "must be a number from 0 on"),
        (["--mix=64x64:weight=0"], "are 0"),
        (["--mix=64x64:prompt=9-3"], "ends before it begins"),
        (["--mix=64x64:prompt=9000"], "there is no prompt of 9000-9000 tokens"),
        (["--rate=0"], "must be a number greater than 0, or inf, got '0'"),
        (["--rate=1", "--concurrency=1"], "only one of them"),
        (["--requests=0"], "a whole number and at least 1"),
        (["--trace=missing"], "missing: No such file"),
        (["--trace=bad.jsonl"], "bad.jsonl, line 2: "),
        (["--trace=odd.jsonl"], "odd.jsonl, line 1: width"),
        (["--previews=2"], "only streams have them"),
        (["--extra=[]"], "--extra: must be a JSON object"),
        (["--extra={"], "--extra: is no JSON"),
        (["--slo=1"], "unrecognized arguments: --slo=1"),
    ],
)
def test_what_cannot_be_is_one_line(
    fake_process: Fake, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture, flags, error
):
    fake_process.script({})
    Path("bad.jsonl").write_text('{"time_s": 0, "width": 64, "height": 64}\nnonsense\n')
    Path("odd.jsonl").write_text('{"time_s": 0, "width": "64", "height": 64}\n')
    assert bench("load", "--url", fake_process.url, "--requests=2", *flags) == 2
    found = capsys.readouterr().err.strip()
    assert error in found
    assert len(found.splitlines()) == 1
    assert not Path("krea2-bench-load.json").exists()


def test_a_refusing_server_leaves_earlier_results_alone(fake: VirtualServer, bench: Bench, capsys):
    fake.script({})
    assert bench(*quick(fake, "--concurrency=1", "--requests=2")) == 0
    before = Path("krea2-bench-load.json").read_text()
    fake.script({"status": 500})
    assert bench("load", "--url", fake.url, SMALL) == 2
    assert "did not generate 64x64: 500 internal_error" in capsys.readouterr().err
    assert Path("krea2-bench-load.json").read_text() == before


def test_keys_are_sent_and_kept_out_of_files(fake_process: Fake, bench: Bench, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-secret-secret")
    fake_process.script({})
    flags = ["--api-key-variable=MY_KEY", "--concurrency=1", "--requests=2"]
    assert bench(*quick(fake_process, *flags)) == 0
    for file in Path().iterdir():
        assert "sk-secret" not in file.read_text()


@pytest.mark.slow
def test_one_core_drives_two_thousand_requests_at_a_time(fake_process: Fake, tmp_path: Path):
    """The client has one core; 3 s of waiting hide what the server's other core cannot do."""
    fake_process.script({"wait_s": 3.0})
    cpus = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cpus[0]), str(BENCH)]
    command += quick(fake_process, "--concurrency=2000", "--requests=6000")
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    (point,) = json.loads((tmp_path / "krea2-bench-load.json").read_text())["points"]
    assert fake_process.statistics["most_in_flight"] == 2000
    assert point["done"] == 6000
