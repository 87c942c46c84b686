"""Anything that can happen, in any order: what must always hold, holds."""

import logging
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import TRANSITIONS, Sequence, State
from krea2_srt.engine.policy import POLICIES
from krea2_srt.errors import DrainingError, QueueFullError, RequestError
from krea2_srt.request import AdapterUse, ImageRequest
from tests.unit.engine.fakes import H200, Harness, image

QUICK = settings(
    stateful_step_count=40,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(
    QUICK, max_examples=4 * QUICK.max_examples, stateful_step_count=150, derandomize=False
)

LAUNCHES = CostModel(
    floor=0, launch=20, per_token=0.01, per_square=0, encode_launch=2, decode_launch=30
)
"""A machine on which packs pay."""

STARTED_OR_BROKEN_OFF = {
    State.WAITING: {State.WAITING},
    State.ENCODING: {State.ENCODING},
    State.DENOISING: {State.DENOISING, State.DECODING, State.DONE},
    State.DONE: {State.DONE},
    State.FAILED: {State.DONE, State.FAILED},
    State.CANCELLED: {State.DONE, State.CANCELLED},
}
"""The states that a request's sequences may have, by the request's own."""

seeds = st.integers(0, 2**16)
"""Choices are made by generators of their own: drawn one by one they would take more of
Hypothesis's entropy than a long run has, and most runs would be cut short."""

SIDES = (16, 64, 256, 512, 1024, 2048)


def random_config(choose: Random) -> EngineConfig:
    return EngineConfig(
        policy=choose.choice(list(POLICIES)),
        max_turn_ms=choose.choice([5.0, 60.0, 200.0, 1000.0]),
        max_pack_tokens=choose.choice([500, 4000, 40000]),
        max_pack_sequences=choose.choice([1, 4, 64]),
        max_active_sequences=choose.choice([2, 10, 256]),
        max_paused_steps=choose.choice([1, 2, 3]),
        max_queue_s=choose.choice([1.0, 30.0, 1000.0]),
    )


def random_adapters(choose: Random) -> frozenset[AdapterUse]:
    names = choose.sample("abcdefghi", choose.choice([0, 0, 1, 1, 2]))
    return frozenset(AdapterUse(name, name) for name in names)


def random_image(choose: Random, sides: tuple[int, ...]) -> ImageRequest:
    return image(
        (choose.choice(sides), choose.choice(sides)),
        choose.randint(1, 6),
        num_images=choose.choice([1, 1, 1, 2, 3, 6]),
        guidance=choose.choice([0.0, 0.0, 3.5]),
        prompt=choose.choice(["", "a" * 100, "b" * 1000, "c" * 5000]),
        adapters=random_adapters(choose),
    )


def reachable(state: State) -> set[State]:
    found = {state}
    for following in TRANSITIONS[state]:
        found |= reachable(following)
    return found


REACHABLE = {state: reachable(state) for state in State}


class EngineMachine(RuleBasedStateMachine):
    """Clients, failures and time against an engine on a fake device."""

    @initialize(seed=seeds)
    def start(self, seed):
        choose = Random(seed)
        self.config = random_config(choose)
        self.harness = Harness(
            self.config,
            choose.choice([H200, LAUNCHES]),
            overlaps_decodes=choose.random() < 0.5,
            full_schedule_graphs=choose.random() < 0.5,
            reports_late=choose.random() < 0.5,
            decode_slices=choose.randint(1, 3),
            text_tokens=choose.choice([None, 17]),
            slowdown=choose.choice([1.0, 1.0, 0.3, 4.0]),
            memory_tokens=choose.choice([None, None, 5000, 20000]),
            max_adapters=choose.choice([100, 8, 3]),
        )
        self.states: dict[Sequence, State] = {}
        self.stepped: set[Sequence] = set()
        self.stepped_of = self.looked_at = 0
        self.refused = 0

    @rule(seed=seeds)
    def arrive(self, seed):
        choose = Random(seed)
        self.submit(choose, [random_image(choose, SIDES) for _ in range(choose.randint(1, 3))])

    @rule(seed=seeds)
    def arrive_small(self, seed):
        choose = Random(seed)
        for _ in range(choose.randint(1, 5)):
            self.submit(choose, [random_image(choose, SIDES[:3])])

    def submit(self, choose: Random, images: list[ImageRequest]) -> None:
        urgency = {
            "priority": choose.choice([0, 0, -2, 1]),
            "deadline_s": choose.choice([None, None, None, None, 0.0, 0.05, 1.0, 30.0]),
        }
        try:
            request = self.harness.submit(images=images, **urgency)
        except RequestError:
            self.refused += 1
            used = {use.digest for image in images for use in image.adapters}
            assert len(used) > self.harness.executor.max_adapters
            return
        except DrainingError:
            self.refused += 1
            assert self.harness.engine.draining
            return
        except QueueFullError as refusal:
            retry_after_s = refusal.retry_after_s
            self.refused += 1
            assert 0 < retry_after_s <= self.harness.engine.outstanding_ms / 1e3
            return
        executor = self.harness.executor
        match choose.choice([None] * 12 + ["step", "finite", "encode", "decode"]):
            case "step":
                executor.poisoned.add(choose.choice(request.sequences))
            case "finite":
                executor.non_finite.add(choose.choice(request.sequences))
            case "encode":
                executor.unencodable.add(request)
            case "decode":
                executor.undecodable.add(choose.choice(request.sequences))

    @rule(number=st.integers(1, 30))
    def turns(self, number):
        self.harness.turns(number)

    @rule()
    def run_until_something_ends(self):
        ended = len(self.harness.ended)
        while len(self.harness.ended) == ended and self.harness.turn():
            pass

    @precondition(lambda self: len(self.harness.engine.requests) > 2)
    @rule(seed=seeds)
    def cancel(self, seed):
        request = Random(seed).choice(list(self.harness.engine.requests.values()))
        self.harness.cancel(request)
        assert request.state is State.CANCELLED

    @rule(ms=st.sampled_from([1, 50, 500, 5000]))
    def pass_time(self, ms):
        self.harness.clock.advance(ms)

    @precondition(lambda self: len(self.harness.engine.requests) > 2)
    @rule(seed=seeds)
    def something_breaks(self, seed):
        choose = Random(seed)
        executor = self.harness.executor
        if choose.random() < 0.5:
            executor.memory_tokens = choose.choice([None, None, 300, 5000, 20000])
            return
        live = [s for r in self.harness.engine.requests.values() for s in r.sequences]
        executor.poisoned.add(choose.choice(live))

    @precondition(lambda self: len(self.harness.all) > 30)
    @rule()
    def drain(self):
        self.harness.engine.drain()

    @invariant()
    def counters_balance(self):
        counters = self.harness.engine.counters
        requests = self.harness.engine.requests
        assert counters.accepted == counters.ended + len(requests) == len(self.harness.all)
        assert counters.refused == self.refused
        for end in (State.DONE, State.FAILED, State.CANCELLED):
            number = sum(request.state is end for request in self.harness.all)
            assert getattr(counters, end.value) == number

    @invariant()
    def outstanding_work_is_the_sum_over_requests(self):
        engine = self.harness.engine
        total = sum(request.remaining_ms for request in engine.requests.values())
        assert abs(engine.outstanding_ms - total) <= 1e-6 * (1 + total)
        assert all(request.remaining_ms > 0 for request in engine.requests.values())
        assert all(r.remaining_ms == 0 for r in self.harness.all if r.ended)

    @invariant()
    def every_request_ends_once_and_is_then_gone(self):
        # `Harness` asserts that no end is told twice.
        ended = {request.id for request in self.harness.all if request.ended}
        assert ended == set(self.harness.ended)
        assert ended.isdisjoint(self.harness.engine.requests)
        for request in self.harness.all:
            assert (request.error is not None) == (request.state is State.FAILED)

    @invariant()
    def states_are_legal(self):
        for request in self.harness.all:
            for sequence in request.sequences:
                before = self.states.get(sequence, State.WAITING)
                assert sequence.state in REACHABLE[before]
                assert sequence.state in STARTED_OR_BROKEN_OFF[request.state]
                assert 0 <= sequence.step <= sequence.image.steps
                self.states[sequence] = sequence.state

    @invariant()
    def the_scheduler_knows_who_waits_and_who_is_active(self):
        statistics = self.harness.engine.statistics()
        live = list(self.harness.engine.requests.values())
        active = [request for request in live if request.state is not State.WAITING]
        for ran in self.harness.ran[self.stepped_of :]:
            if ran.kind == "step":
                self.stepped.update(ran.sequences)
        self.stepped_of = len(self.harness.ran)
        begun = {sequence for sequence in self.stepped if not sequence.state.ended}
        assert statistics["waiting"] == len(live) - len(active)
        # The fake device asserts that no further request is encoded beside too many of them.
        assert statistics["active_sequences"] == len(begun)
        assert self.harness.executor.begun == begun
        assert statistics["paused_steps"] == len(self.harness.executor.paused)
        assert statistics["paused_steps"] <= self.config.max_paused_steps
        assert 1 <= statistics["pack_tokens_budget"] <= self.config.max_pack_tokens

    @invariant()
    def sequences_are_released_when_they_end(self):
        sequences = {s for request in self.harness.all for s in request.sequences}
        assert self.harness.executor.released == {s for s in sequences if s.state.ended}

    @invariant()
    def every_unit_of_work_keeps_the_limits(self):
        for ran in self.harness.ran[self.looked_at :]:
            if ran.kind != "step":
                continue
            tokens = sum(sum(sequence.tokens) for sequence in ran.sequences)
            if self.harness.executor.slowdown == 1:
                assert ran.ms <= self.config.max_turn_ms * (1 + 1e-9) or len(ran.blocks) == 1
            assert len(ran.sequences) <= self.config.max_pack_sequences
            assert tokens <= self.config.max_pack_tokens or len(ran.sequences) == 1
        self.looked_at = len(self.harness.ran)

    def teardown(self):
        if not hasattr(self, "harness"):
            return
        self.harness.engine.drain()
        self.harness.run()
        self.harness.check_empty()
        self.every_unit_of_work_keeps_the_limits()
        self.counters_balance()
        self.every_request_ends_once_and_is_then_gone()
        self.states_are_legal()
        COUNTED.append(sum(len(request.sequences) for request in self.harness.all))


COUNTED: list[int] = []
"""Sequences of each run."""


@pytest.fixture(autouse=True)
def quiet_log():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_whatever_happens_every_request_ends_once_and_nothing_is_left():
    COUNTED.clear()
    run_state_machine_as_test(EngineMachine, settings=QUICK)
    print(f"{sum(COUNTED)} sequences in {len(COUNTED)} runs")
    assert sum(COUNTED) > 10 * QUICK.max_examples


@pytest.mark.slow
def test_whatever_happens_for_long_every_request_ends_once_and_nothing_is_left():
    run_state_machine_as_test(EngineMachine, settings=LONG)
