"""What is compared: a policy of the engine with its settings, and a router before the replicas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from krea2_srt.engine import pack_builder, policy, step_scheduler
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.lifecycle import Request

SLO_FACTOR = 3.0
"""A request is in time within this many times its time alone on an idle replica."""

ARRIVAL_ALONE = (0.0, 0.0)
"""Weights of a key that is the time of arrival."""

NEVER = 1e9
"""Seconds, or milliseconds, that no simulation reaches."""


@dataclass(frozen=True)
class Scheduler:
    """A way to serve.

    Attributes:
        name: in tables.
        router: one of `routers.ROUTERS`.
        config: of every engine.
        deadlines: whether requests carry the SLO as their deadline; the engine gives up those
            that reach it.
        stretch, min_gain, encoded_together: in place of the engine's constants `STRETCH`,
            `MIN_GAIN` and `MAX_ENCODED_TOGETHER`.
        weights: (a, b) of a key arrival + a * total + b * remaining seconds of work, in place of
            the policy's.
    """

    name: str
    router: str
    config: EngineConfig
    deadlines: bool = False
    stretch: float = policy.STRETCH
    min_gain: float = pack_builder.MIN_GAIN
    encoded_together: int = step_scheduler.MAX_ENCODED_TOGETHER
    weights: tuple[float, float] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The engine's modules with these settings, for as long as this lasts."""
        name = self.config.policy
        before = (
            policy.POLICIES[name],
            policy.STRETCH,
            pack_builder.MIN_GAIN,
            step_scheduler.MAX_ENCODED_TOGETHER,
        )
        policy.STRETCH, pack_builder.MIN_GAIN = self.stretch, self.min_gain
        step_scheduler.MAX_ENCODED_TOGETHER = self.encoded_together
        if self.weights is not None:
            policy.POLICIES[name] = weighted_key(*self.weights)
        try:
            yield
        finally:
            policy.POLICIES[name], policy.STRETCH = before[:2]
            pack_builder.MIN_GAIN, step_scheduler.MAX_ENCODED_TOGETHER = before[2:]


def weighted_key(a: float, b: float) -> Callable[[Request], float]:
    """A policy: arrival + a * total + b * remaining work, in seconds.

    (0, `STRETCH`) is srpt; (3, 0) is earliest due date first, were requests due at 3 times their
    time alone.
    """

    def key(request: Request) -> float:
        # The first key is asked for when nothing is done yet.
        total_ms = vars(request).setdefault("total_ms", request.remaining_ms)
        return request.arrival + (a * total_ms + b * request.remaining_ms) / 1e3

    return key


def request_at_a_time(router: str) -> Scheduler:
    """The baseline, what unmodified SGLang does: each request from start to end, in order.

    A request for more images has its prompt encoded once and generates them one after the other.
    """
    config = EngineConfig(
        max_pack_sequences=1,
        max_active_sequences=1,
        max_turn_ms=NEVER,
        max_queue_s=NEVER,
    )
    return Scheduler(
        f"baseline, {router}", router, config, encoded_together=1, weights=ARRIVAL_ALONE
    )


def first_come_first_served(router: str) -> Scheduler:
    """Our engine, but in order of arrival."""
    config = replace(EngineConfig(), max_queue_s=NEVER)
    return Scheduler(f"fcfs, {router}", router, config, weights=ARRIVAL_ALONE)


def ours(policy_name: str, router: str) -> Scheduler:
    """A policy of the engine, which takes everything; under edf the SLO is the deadline."""
    config = replace(EngineConfig(), policy=policy_name, max_queue_s=NEVER)
    return Scheduler(f"{policy_name}, {router}", router, config, deadlines=policy_name == "edf")
