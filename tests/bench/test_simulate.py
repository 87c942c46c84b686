"""The cluster simulator: honest clocks, honest baselines, and the same answer every time."""

import gc
import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from krea2_bench import arrivals
from krea2_bench import simulate as command
from krea2_bench.percentiles import percentile
from krea2_bench.simulation import traces
from krea2_bench.simulation.cluster import Cluster, Hardware, simulate
from krea2_bench.simulation.experiment import GRID, Experiment
from krea2_bench.simulation.plots import draw
from krea2_bench.simulation.replica import Replica, Taken
from krea2_bench.simulation.routers import ROUTERS, Offer
from krea2_bench.simulation.schedulers import (
    Scheduler,
    ours,
    request_at_a_time,
)
from krea2_bench.simulation.study import BASELINES, DEFAULT, MAIN, OTHERS
from krea2_bench.simulation.summary import summarise
from krea2_bench.simulation.traces import DEFAULT_MIX, Arrival, Job, Share, draw_trace
from krea2_srt.engine import pack_builder, policy, step_scheduler

HARDWARE = Hardware(replicas=2)
SMALL = Job(256, 256, steps=2)
LARGE = Job(2048, 2048, steps=2)
ALL = (*MAIN, *OTHERS)


def trace_of(count: int, load: float = 0.8, seed: int = 0, process: str = "poisson"):
    return draw_trace(process, DEFAULT_MIX, count, lambda jobs: HARDWARE.rate(jobs, load), seed)


def ended_by(replica: Replica) -> list[str]:
    return [request.id for request in replica.advance(math.inf)]


def watch(replica: Replica) -> list[tuple[str, str]]:
    """What the replica runs from now on: kind of work and ids of its requests, turn by turn."""
    seen: list[tuple[str, str]] = []
    executor = replica.executor
    encode, step, decode = executor.encode, executor.step, executor.decode

    def watched_encode(requests):
        seen.append(("encode", " ".join(request.id for request in requests)))
        return encode(requests)

    def watched_step(pack, blocks):
        seen.append(("step", " ".join(sequence.request.id for sequence in pack.sequences)))
        return step(pack, blocks)

    def watched_decode(sequence):
        seen.append(("decode", sequence.request.id))
        return decode(sequence)

    executor.encode, executor.step, executor.decode = watched_encode, watched_step, watched_decode
    return seen


# Determinism.


@pytest.mark.parametrize("scheduler", ALL, ids=lambda s: s.name)
def test_the_same_seed_gives_the_same_summary(scheduler: Scheduler):
    first, again = (summarise(simulate(HARDWARE, scheduler, trace_of(150))) for _ in range(2))
    assert first == again


def test_another_seed_gives_another_summary():
    first, other = (
        summarise(simulate(HARDWARE, DEFAULT, trace_of(150, seed=seed))) for seed in (0, 1)
    )
    assert first != other


# Traces.


@pytest.mark.parametrize("process", traces.PROCESSES)
def test_traces_are_sorted_and_keep_their_rate(process: str):
    trace = trace_of(20_000, load=0.5, process=process)
    assert all(a.time_s <= b.time_s for a, b in pairwise(trace))
    wanted = HARDWARE.rate([arrival.job for arrival in trace], 0.5)
    assert len(trace) / trace[-1].time_s == pytest.approx(wanted, rel=0.1)


def test_bursty_arrivals_vary_more_than_poisson_ones():
    def variation(process: str) -> float:
        times = np.array([arrival.time_s for arrival in trace_of(20_000, process=process)])
        return float(np.diff(times).std() / np.diff(times).mean())

    assert variation("poisson") == pytest.approx(1, rel=0.05)
    assert variation("bursty") == pytest.approx(traces.BURSTY_VARIATION, rel=0.1)


def test_diurnal_arrivals_swing_around_their_rate():
    times = arrivals.diurnal(100_000, 10.0, np.random.default_rng(0))
    phase = times % arrivals.DIURNAL_PERIOD_S < arrivals.DIURNAL_PERIOD_S / 2
    day = times < 5 * arrivals.DIURNAL_PERIOD_S
    high, low = (phase & day).sum(), (~phase & day).sum()
    # The mean of a sine over its upper half is 2/pi of its height.
    swing = 2 / math.pi * arrivals.DIURNAL_AMPLITUDE
    assert high / low == pytest.approx((1 + swing) / (1 - swing), rel=0.05)


def test_sizes_come_by_their_weights_and_load_changes_only_the_rate():
    low, high = trace_of(20_000, load=0.2), trace_of(20_000, load=0.8)
    assert [a.job for a in low] == [a.job for a in high]
    assert low[-1].time_s == pytest.approx(4 * high[-1].time_s)
    for share in DEFAULT_MIX:
        part = sum(a.job.width == share.side for a in low) / len(low)
        assert part == pytest.approx(share.weight / 100, rel=0.1)


def test_a_written_trace_is_read_as_it_was(tmp_path: Path):
    trace = trace_of(50)
    traces.write_trace(trace, tmp_path / "trace.jsonl")
    assert traces.read_trace(tmp_path / "trace.jsonl") == trace


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no arrival"),
        ("{", "line 1"),
        ('{"time_s": 0, "width": 16}', "line 1.*height"),
        ('{"width": 16, "height": 16}', "line 1.*time_s"),
        ('{"time_s": 1, "width": 16, "height": 16}\n' * 2 + "[]", "line 3"),
        (
            '{"time_s": 1, "width": 16, "height": 16}\n{"time_s": 0, "width": 16, "height": 16}',
            "line 2.*before",
        ),
    ],
)
def test_a_wrong_trace_is_refused_by_its_line(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        traces.read_trace(path)


# The clock.


@pytest.mark.parametrize("images", [1, 3])
def test_time_alone_is_the_sum_of_costs_and_of_the_host(images: int):
    job = Job(1024, 1024, steps=4, num_images=images, text_tokens=60)
    cost, host_ms = HARDWARE.cost, HARDWARE.host_ms
    tokens = 64 * 64 + 65
    work_ms = cost.encode(65) + images * (4 * cost.step([tokens]) + cost.decode(1024 * 1024))
    turns = 1 + images * (4 + 1)
    assert HARDWARE.alone_s(job) * 1e3 == pytest.approx(work_ms + turns * host_ms)


@pytest.mark.parametrize("scheduler", ALL, ids=lambda s: s.name)
def test_no_turn_of_ours_is_longer_than_its_limit(scheduler: Scheduler):
    result = simulate(HARDWARE, scheduler, trace_of(200, load=1.0))
    longest_ms = max(counters.longest_turn_ms for counters in result.counters)
    if scheduler in BASELINES:
        assert longest_ms > 700  # a whole step at 2048 x 2048
    else:
        assert longest_ms <= scheduler.config.max_turn_ms + HARDWARE.host_ms + 1e-6


def test_a_decode_longer_than_a_turn_is_sliced():
    config = replace(ours("srpt", "least-work").config, max_turn_ms=30.0)
    replica = Replica(config, HARDWARE.cost, 0.0)
    seen = watch(replica)
    replica.submit("a", LARGE, 0.0)
    assert ended_by(replica) == ["a"]
    assert seen.count(("decode", "a")) == math.ceil(HARDWARE.cost.decode(2048 * 2048) / 30)
    assert replica.engine.counters.longest_turn_ms <= 30.0 + 1e-9


def test_what_arrives_during_a_turn_is_taken_in_after_it_and_timed_from_its_arrival():
    replica = Replica(request_at_a_time("round-robin").config, HARDWARE.cost, 0.0)
    replica.submit("a", LARGE, 0.0)
    list(replica.advance(0.1))
    after_turn = replica.clock.now
    assert after_turn > 0.1
    replica.submit("b", SMALL, 0.1)
    assert replica.engine.requests["b"].arrival == after_turn
    result = simulate(Hardware(1), BASELINES[0], [Arrival(0.0, LARGE), Arrival(0.1, SMALL)])
    alone = Hardware(1).alone_s
    assert result.latency_s[1] == pytest.approx(alone(LARGE) + alone(SMALL) - 0.1)


def test_an_idle_replica_wastes_no_time():
    result = simulate(Hardware(1), DEFAULT, [Arrival(5.0, SMALL), Arrival(50.0, SMALL)])
    assert result.latency_s == pytest.approx([Hardware(1).alone_s(SMALL)] * 2)


# The baseline.


def test_the_baseline_runs_one_request_from_start_to_end_in_order_of_arrival():
    jobs = {"a": LARGE, "b": replace(SMALL, num_images=3), "c": SMALL, "d": LARGE, "e": SMALL}
    with BASELINES[0].installed():
        replica = Replica(request_at_a_time("round-robin").config, HARDWARE.cost, 0.3)
        seen = watch(replica)
        for request_id, job in jobs.items():
            replica.submit(request_id, job, 0.0)
        assert ended_by(replica) == list(jobs)
    wanted = []
    for request_id, job in jobs.items():
        wanted.append(("encode", request_id))
        for _ in range(job.num_images):
            wanted += [("step", request_id)] * job.steps + [("decode", request_id)]
    assert seen == wanted


@pytest.mark.parametrize("images", [1, 3])
def test_the_baseline_takes_as_long_as_a_queue_of_times_alone(images: int):
    mix = [replace(share, num_images=images) for share in DEFAULT_MIX]
    hardware = Hardware(1)
    trace = draw_trace("poisson", mix, 200, lambda jobs: hardware.rate(jobs, 0.9), 3)
    result = simulate(hardware, BASELINES[0], trace)
    free_s, wanted = 0.0, []
    for arrival in trace:
        free_s = max(free_s, arrival.time_s) + hardware.alone_s(arrival.job)
        wanted.append(free_s - arrival.time_s)
    assert result.latency_s == pytest.approx(wanted)


def test_round_robin_takes_turns_and_the_others_find_the_idle_replica():
    arrivals = [Arrival(0.0, LARGE), Arrival(0.01, SMALL), Arrival(0.02, SMALL)]
    for router in ROUTERS:
        scheduler = request_at_a_time(router)
        result = simulate(Hardware(2), scheduler, arrivals)
        waits = result.latency_s[2] > Hardware(2).alone_s(LARGE)
        assert waits == (router == "round-robin"), router


@dataclass
class HeldWork:
    """What routers see of a replica."""

    work: list[tuple[float, float, float]]
    """Work of each request: key, total and remaining ms."""

    @property
    def taken(self) -> dict[int, Taken]:
        return {i: Taken(key, total_ms) for i, (key, total_ms, _) in enumerate(self.work)}

    @property
    def engine(self) -> SimpleNamespace:
        requests = {
            i: SimpleNamespace(key=k, remaining_ms=r) for i, (k, _, r) in enumerate(self.work)
        }
        return SimpleNamespace(
            requests=requests, outstanding_ms=sum(remaining for *_, remaining in self.work)
        )

    def turn_ms(self, time_s: float) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("router", "chosen"),
    [
        ("round-robin", 3),
        ("total-work", 0),
        ("least-work", 1),
        ("total-ahead", 2),
        ("added-wait", 0),
        ("work-ahead", 3),
    ],
)
def test_routers_differ_in_the_work_that_they_count(router: str, chosen: int):
    replicas = [
        HeldWork([(1.0, 500.0, 500.0)]),
        HeldWork([(1.0, 900.0, 200.0)]),
        HeldWork([(1.0, 300.0, 300.0), (9.0, 900.0, 900.0)]),
        HeldWork([(1.0, 700.0, 100.0), (9.0, 900.0, 900.0)]),
    ]
    offer = Offer(number=7, time_s=0.0, key=5.0, work_ms=400.0)
    assert ROUTERS[router](replicas, offer) is replicas[chosen]


@pytest.mark.parametrize("router", ["total-ahead", "added-wait", "work-ahead"])
def test_where_nothing_is_ahead_all_work_counts(router: str):
    replicas = [HeldWork([(9.0, 900.0, 900.0)]), HeldWork([(9.0, 500.0, 500.0)])]
    assert ROUTERS[router](replicas, Offer(0, 0.0, key=5.0)) is replicas[1]


# Settings.


def test_settings_hold_only_while_they_are_installed():
    def settings():
        constants = policy.STRETCH, pack_builder.MIN_GAIN, step_scheduler.MAX_ENCODED_TOGETHER
        return constants, dict(policy.POLICIES)

    before = settings()
    scheduler = replace(DEFAULT, stretch=99.0, min_gain=0.7, encoded_together=3, weights=(3.0, 0.0))
    with pytest.raises(ZeroDivisionError), scheduler.installed():
        assert settings()[0] == (99.0, 0.7, 3)
        assert policy.POLICIES["srpt"] is not policy.srpt
        raise ZeroDivisionError
    assert settings() == before


def test_a_weighted_key_can_be_srpt():
    stretch = replace(DEFAULT, weights=(0.0, DEFAULT.stretch))
    first, second = (
        simulate(HARDWARE, scheduler, trace_of(200)).latency_s for scheduler in (DEFAULT, stretch)
    )
    assert first == pytest.approx(second)


# Figures.


def test_every_request_ends_and_counters_agree():
    for scheduler in ALL:
        result = simulate(HARDWARE, scheduler, trace_of(200, load=1.1))
        for counters in result.counters:
            assert counters.accepted == counters.ended
            assert counters.refused == counters.cancelled == 0
        done = sum(counters.done for counters in result.counters)
        assert done == np.isfinite(result.latency_s).sum()
        assert sum(counters.accepted for counters in result.counters) == 200
        if not scheduler.deadlines:
            assert done == 200


def test_a_request_given_up_at_its_deadline_is_a_miss():
    summary = summarise(simulate(HARDWARE, ours("edf", "least-work"), trace_of(400, load=1.4)))
    assert 0 < summary.failed <= summary.misses
    assert summary.as_dict()["sizes"]["2048x2048"]["p99_s"] is None
    json.dumps(summary.as_dict(), allow_nan=False)


def test_figures_of_an_easy_load():
    hardware = Hardware(4)
    trace = [Arrival(10.0 * i, SMALL) for i in range(100)]
    summary = summarise(simulate(hardware, DEFAULT, trace))
    assert summary.images_per_s == pytest.approx(0.1, rel=0.05)
    assert summary.goodput_per_s == summary.images_per_s
    assert summary.megapixels_per_s == pytest.approx(0.1 * 256 * 256 / 1e6, rel=0.05)
    assert summary.utilisation == pytest.approx(hardware.alone_s(SMALL) / 40, rel=0.05)
    assert summary.misses == summary.failed == 0
    assert summary.jain == pytest.approx(1)
    assert summary.max_slowdown == pytest.approx(1)
    (size,) = summary.sizes.values()
    assert size.requests == 90
    assert size.p50_s == pytest.approx(hardware.alone_s(SMALL))


def test_percentiles_are_values_that_occur():
    values = np.array([1.0, 2.0, 3.0, math.inf])
    assert [percentile(values, q) for q in (25, 50, 75, 99)] == [1.0, 2.0, 3.0, math.inf]


def test_only_measured_size_classes_have_figures():
    trace = [Arrival(0.0, LARGE), *(Arrival(20.0 * i, SMALL) for i in range(1, 20))]
    summary = summarise(simulate(HARDWARE, DEFAULT, trace))
    assert list(summary.sizes) == ["256x256"]


@pytest.mark.parametrize("first", [(), (0.3,), (0.8, 1.0, 0.2), GRID])
def test_capacity_is_the_highest_load_that_is_borne(first, monkeypatch: pytest.MonkeyPatch):
    experiment = Experiment(HARDWARE, DEFAULT_MIX, 10)
    for highest in (0.0, 0.05, 0.3, 0.85, 1.1):
        monkeypatch.setattr(
            Experiment, "bears", lambda _experiment, _s, load, _seed, most=highest: load <= most
        )
        assert experiment.capacity(DEFAULT, 0, first) == highest


def test_ours_bears_more_than_the_baseline():
    experiment = Experiment(HARDWARE, DEFAULT_MIX, 2000)
    assert experiment.run(DEFAULT, 0.7, 0).misses < experiment.run(BASELINES[1], 0.7, 0).misses / 4
    count = experiment.simulations
    experiment.run(DEFAULT, 0.7, 0)
    assert experiment.simulations == count


# The command.


@pytest.mark.slow
def test_a_quick_run_leaves_tables_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "QUICK_REQUESTS", 60)
    command.main(["--quick", "--output", str(tmp_path)])
    study = json.loads((tmp_path / "simulate.json").read_text(encoding="utf-8"))
    assert study["run"]["seed"] == 0
    assert study["run"]["command"].startswith("python -m krea2_bench.simulate --quick")
    assert set(study["table"]) == {scheduler.name for scheduler in ALL}
    page = (tmp_path / "simulate.md").read_text(encoding="utf-8")
    for name in study["table"]:
        assert f"| {name} |" in page
    for plot in ("attainment", "slowdown", "latency"):
        path = tmp_path / f"simulate_{plot}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.name in page
    again = tmp_path / "again"
    again.mkdir()
    for name in draw(study, again):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_trace_can_be_written_and_replayed(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    command.main(["--requests", "40", "--write-trace", str(path)])
    command.main(["--trace", str(path), "--output", str(tmp_path)])
    study = json.loads((tmp_path / "simulate.json").read_text(encoding="utf-8"))
    assert study["run"]["trace"] == "trace.jsonl"
    assert study["run"]["requests"] == 40
    assert "claims" not in study
    assert str(tmp_path) not in (tmp_path / "simulate.md").read_text(encoding="utf-8").replace(
        study["run"]["command"], ""
    )


def test_without_matplotlib_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "study", lambda *_: {})
    with pytest.raises(SystemExit, match=r"uv pip install '\.\[bench\]'"):
        command.main(["--quick", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mix", "256"], "SIDE:WEIGHT"),
        (["--mix", "250:1"], "multiples of 16"),
        (["--mix", "256:0"], "above 0"),
        (["--replicas", "0"], "at least 1"),
        (["--load", "0"], "greater than 0"),
        (["--host-overhead-ms", "-1"], "not be negative"),
        (["--cost", "no-such-file.json"], "no-such-file"),
        (["--quic"], "unrecognized"),
    ],
)
def test_wrong_options_are_errors(arguments, reason, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_a_mix_names_steps_and_images():
    args = command.build_parser().parse_args(["--mix", "256:40,1024:5:52:4"])
    assert args.mix == (Share(256, 40), Share(1024, 5, 52, 4))


# Endurance.


@pytest.mark.slow
def test_memory_stays_flat_over_100_000_requests():
    job = Job(64, 64, steps=1)
    hardware = Hardware(4)
    with DEFAULT.installed():
        cluster = Cluster(hardware, DEFAULT, lambda *_: None)
        rng = np.random.default_rng(0)
        gap_s = hardware.alone_s(job) / hardware.replicas / 0.9
        blocks, time_s = [], 0.0
        for _ in range(10):
            for gap in rng.exponential(gap_s, 10_000).tolist():
                time_s += gap
                cluster.arrive(Arrival(time_s, job))
            cluster.drain()
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    # From the second ten thousand on, nothing but a few numbers may differ.
    assert max(blocks[1:]) - blocks[1] < 500, blocks
    for replica in cluster.replicas:
        counters = replica.engine.counters
        assert counters.accepted == counters.done + counters.failed + counters.cancelled
        assert replica.engine.idle
        assert not replica.taken
        assert replica.engine.outstanding_ms == 0.0
        statistics = replica.engine.statistics()
        for left in ("requests", "waiting", "active_sequences", "paused_steps"):
            assert statistics[left] == 0
    assert sum(r.engine.counters.done for r in cluster.replicas) == 100_000
