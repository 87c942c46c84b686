"""Which parts of the GPU benchmark run, and when: on a simulated clock, without processes."""

from dataclasses import dataclass, field

import pytest

from krea2_bench.gpu import parts
from krea2_bench.gpu.budget import RESERVE_S, PartPlan, Session
from krea2_bench.gpu.rows import FAILED, SKIPPED, Findings, Missing

FIRST_CALL = [
    "correctness",
    "ceilings",
    "gemm",
    "attention",
    "kernels",
    "equality",
    "steps",
    "steps_8bit",
    "text",
    "vae",
    "beside",
]


@dataclass
class Machine:
    """Children that take as long as is estimated, times ``slow``; some parts end theirs."""

    plan: list[PartPlan]
    findings: Findings = field(default_factory=Findings)
    slow: float = 1.0
    crash: tuple[str, ...] = ()
    now: float = parts.IMPORTS_S
    ran: list[tuple[str, float, float]] = field(default_factory=list)
    children: int = 0

    def session(self, budget_s: float | None) -> Session:
        return Session(
            self.plan, parts.start_s, self.launch, self.findings, lambda: self.now, budget_s
        )

    def launch(self) -> "SimulatedChild":
        self.children += 1
        return SimulatedChild(self)


@dataclass
class SimulatedChild:
    machine: Machine
    group: str = ""
    alive: bool = True

    def run(self, part: str, limit_s: float) -> None:
        assert self.alive
        machine = self.machine
        (plan,) = [p for p in machine.plan if p.name == part]
        start = 0.0 if self.group else parts.start_s(plan.group)
        assert self.group in ("", plan.group)
        self.group = plan.group
        took = min(limit_s, (start + plan.seconds) * machine.slow)
        machine.ran.append((part, machine.now, limit_s))
        machine.now += took
        if part in machine.crash or took == limit_s:
            self.alive = False
            machine.findings.miss(Missing(part, "", FAILED, "crash", by=part))
        else:
            machine.findings.take({"kind": "done", "part": part})

    def close(self) -> None:
        self.alive = False


def test_the_first_call_fits_into_four_minutes_in_order_of_value():
    machine = Machine(parts.plans())
    machine.session(240).run()
    ran = [name for name, _, _ in machine.ran]
    assert ran[: len(FIRST_CALL)] == FIRST_CALL
    assert machine.findings.done[: len(FIRST_CALL)] == FIRST_CALL
    assert [name for name, part in parts.PARTS.items() if part.first_call] == FIRST_CALL
    assert machine.now <= 240
    # The rest is not forgotten, and says what it would take.
    skipped = {m.part: m.reason for m in machine.findings.missing}
    assert set(ran) | skipped.keys() == parts.PARTS.keys()
    assert {m.why for m in machine.findings.missing} == {SKIPPED}
    assert skipped["compile"].startswith("takes about 105 s, ")


def test_the_first_call_takes_at_most_220_seconds():
    machine = Machine(parts.plans(FIRST_CALL))
    machine.session(None).run()
    assert machine.findings.done == FIRST_CALL
    assert 150 <= machine.now <= 220
    assert machine.children == len({parts.PARTS[name].group for name in FIRST_CALL}) == 5


def test_all_of_it_takes_less_than_ten_minutes():
    machine = Machine(parts.plans())
    machine.session(None).run()
    assert machine.findings.done == list(parts.PARTS)
    assert machine.now <= 600
    # What shares models follows each other.
    assert machine.children == len(parts.START_S)


@pytest.mark.parametrize("slow", [1.5, 4.0])
def test_a_machine_that_is_slower_runs_the_most_valuable_and_ends_in_time(slow):
    machine = Machine(parts.plans(), slow=slow)
    machine.session(240).run()
    assert machine.now <= 240
    ran = [name for name, _, _ in machine.ran]
    assert ran[:3] == FIRST_CALL[:3]
    assert {m.part for m in machine.findings.missing} | set(machine.findings.done) == set(
        parts.PARTS
    )


def test_no_part_may_run_beyond_the_budget():
    machine = Machine([PartPlan("gemm", "kernels", 5, 1000)])
    machine.session(100).run()
    ((_, start, limit_s),) = machine.ran
    assert start + limit_s == 100 - RESERVE_S


@pytest.mark.parametrize("name", parts.PARTS)
def test_a_part_that_ends_its_child_ends_no_other_part(name):
    machine = Machine(parts.plans(), crash=(name,))
    machine.session(None).run()
    assert set(machine.findings.done) == parts.PARTS.keys() - {name}
    shared = [n for n, p in parts.PARTS.items() if p.group == parts.PARTS[name].group]
    assert machine.children == len(parts.START_S) + (shared[-1] != name)


def test_what_is_done_is_not_run_again_and_what_failed_comes_last():
    machine = Machine(parts.plans(["gemm", "attention", "steps", "vae"]))
    machine.findings.take({"kind": "done", "part": "attention"})
    machine.findings.miss(Missing("gemm", "", FAILED, "hung", by="gemm"))
    machine.session(None).run()
    assert [name for name, _, _ in machine.ran] == ["steps", "vae", "gemm"]


def test_what_a_part_left_out_under_another_name_is_its_own():
    found = Findings()
    for part in ("steps", "steps_8bit"):
        found.take({"kind": "begin", "part": part})
        found.miss(Missing("steps", f"of {part}", FAILED, "it broke"))
    assert found.failed("steps_8bit")
    # Another run of the one says nothing of the other.
    found.take({"kind": "begin", "part": "steps_8bit"})
    found.take({"kind": "done", "part": "steps_8bit"})
    assert [missing.what for missing in found.missing] == ["of steps"]


def test_deadlines_leave_room_for_an_estimate_that_is_off():
    for part in parts.PARTS.values():
        assert part.deadline_s >= 2 * part.seconds + 15


def test_the_first_part_of_a_child_has_time_to_make_the_models():
    machine = Machine(parts.plans())
    machine.session(None).run()
    leads = {}
    for name, _, limit_s in machine.ran:
        part = parts.PARTS[name]
        if part.group not in leads:
            leads[part.group] = name
            assert limit_s >= 2 * (parts.start_s(part.group) + part.seconds) + 15
        else:
            assert limit_s == part.deadline_s
    assert leads["text"] == "text"


def test_a_child_that_cannot_be_started_costs_its_part_alone():
    machine = Machine(parts.plans(["ceilings", "steps", "text"]))
    faults = iter([False, True])

    def launch():
        if next(faults, False):
            raise RuntimeError("no context")
        return machine.launch()

    Session(machine.plan, parts.start_s, launch, machine.findings, lambda: machine.now).run()
    assert machine.findings.done == ["ceilings", "text"]
    (missing,) = machine.findings.missing
    assert (missing.owner, missing.why) == ("steps", FAILED)
    assert "no context" in missing.reason
