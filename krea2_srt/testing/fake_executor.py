"""A device that does nothing, in the time that a cost model says, on a clock that work moves."""

from collections.abc import Collection
from dataclasses import dataclass, field
from math import ceil, inf

from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import Request, Sequence
from krea2_srt.engine.work import PackStep, StepResult


@dataclass
class VirtualClock:
    """Seconds that pass when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, ms: float) -> None:
        self.now += ms / 1e3


@dataclass(eq=False)
class FakeExecutor:
    """What an engine runs its work on where only the engine matters. It checks nothing; the tests
    of the engine have a strict one, made of this.

    Attributes:
        clock: moved by all work.
        cost: of work on the device; None is nothing, for whatever is done.
        overlaps_decodes, full_schedule_graphs: as of any executor.
        host_ms: added to every unit of work.
        decode_slice_ms: longest slice of a decode.
        max_adapters: on the device at a time.
    """

    clock: VirtualClock
    cost: CostModel | None
    overlaps_decodes: bool = False
    full_schedule_graphs: bool = False
    host_ms: float = 0.0
    decode_slice_ms: float = inf
    max_adapters: float = inf
    _decode_slices: dict[Sequence, int] = field(default_factory=dict)

    def adapters_fit(self, digests: Collection[str]) -> bool:
        return len(digests) <= self.max_adapters

    def encode(self, requests: Collection[Request]) -> None:
        if self.cost is None:
            return
        tokens = 0
        for request in requests:
            first = request.sequences[0]
            tokens += sum(first.tokens) - len(first.tokens) * first.image.image_tokens
        self.spend(self.cost.encode(tokens))

    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        if self.cost is not None:
            ms = self.cost.step(branch for sequence in step.sequences for branch in sequence.tokens)
            self.spend(ms * len(blocks) / step.total_blocks)
        if blocks.stop == step.total_blocks:
            for sequence in step.sequences:
                sequence.step += step.steps
        return [StepResult(step, blocks)]

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        return ()

    def drop_step(self, step: PackStep) -> None:
        """Nothing is held."""

    def decode(self, sequence: Sequence) -> bool:
        if self.cost is None:
            return True
        ms = self.cost.decode(sequence.image.width * sequence.image.height)
        total = max(1, ceil(ms / self.decode_slice_ms))
        self.spend(ms / total)
        done = self._decode_slices.pop(sequence, 0) + 1
        if done < total:
            self._decode_slices[sequence] = done
        return done == total

    def release(self, sequence: Sequence) -> None:
        self._decode_slices.pop(sequence, None)

    def spend(self, ms: float) -> None:
        """Let the time of a unit of work pass."""
        self.clock.advance(ms + self.host_ms)
