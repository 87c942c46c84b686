"""Units of work: what one turn runs on the device."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from krea2_srt.engine.lifecycle import Request, Sequence


@dataclass(frozen=True)
class Encode:
    """Encode the prompts of some requests."""

    requests: tuple[Request, ...]


@dataclass(eq=False)
class PackStep:
    """One step of a pack, done in slices of transformer blocks.

    Attributes:
        sequences: the pack, in order.
        total_blocks: of the model.
        blocks_per_slice: how many fit into a turn.
        blocks_done: by the slices so far.
        steps: done by each sequence; more than one only of a lone sequence, which then does all.
    """

    sequences: tuple[Sequence, ...]
    total_blocks: int
    blocks_per_slice: int
    blocks_done: int = 0
    steps: int = 1

    @property
    def tokens(self) -> int:
        return sum(sum(sequence.tokens) for sequence in self.sequences)

    @property
    def done(self) -> bool:
        return self.blocks_done == self.total_blocks

    @property
    def next_blocks(self) -> range:
        """The next slice."""
        end = min(self.blocks_done + self.blocks_per_slice, self.total_blocks)
        return range(self.blocks_done, end)


@dataclass(frozen=True)
class Decode:
    """One slice of a sequence's VAE decode."""

    sequence: Sequence


Work = Encode | PackStep | Decode


@dataclass(frozen=True)
class StepResult:
    """What became of a step, or of a slice of one.

    Attributes:
        step: which.
        blocks: that ran.
        non_finite: sequences whose latents are no longer finite; empty before the last block.
        ms: that the device took; None is as long as the call of `Executor.step` did.
    """

    step: PackStep
    blocks: range
    non_finite: tuple[Sequence, ...] = ()
    ms: float | None = None


class Executor(Protocol):
    """What runs work: a model runner, or a model of one.

    Any method may raise: `OutOfMemoryError` where memory ran out, anything else for other
    failures. What it raised for is then as it was before the call.
    """

    @property
    def overlaps_decodes(self) -> bool:
        """Whether `decode` only starts and polls work that runs beside the steps."""

    @property
    def full_schedule_graphs(self) -> bool:
        """Whether all steps of a lone sequence are best run at once, where they fit into a turn."""

    def adapters_fit(self, digests: Collection[str]) -> bool:
        """Whether the device has room for all of these adapters at a time."""

    def encode(self, requests: Collection[Request]) -> None:
        """Encode all prompts; sets the true `Sequence.tokens`."""

    def step(self, step: PackStep, blocks: range) -> Collection[StepResult]:
        """Run some blocks of a step; with the last of them, step every sequence of the pack, as
        many times as it says, and count that in its `Sequence.step`. The device may still be at it
        when this returns.

        Returns:
            What has become known since the last call: of this step, or of earlier ones. Each is
            told once, in order.
        """

    def settle(self, sequence: Sequence | None = None) -> Collection[StepResult]:
        """Wait until it is known what became of the steps so far.

        Args:
            sequence: whose steps; None is all.

        Returns:
            What has become known, as in `step`.
        """

    def drop_step(self, step: PackStep) -> None:
        """Forget the slices done of a step that is not finished."""

    def decode(self, sequence: Sequence) -> bool:
        """Run one slice of the decode.

        Returns:
            Whether it was the last one.
        """

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, whatever of it there is; pixels that wait to be taken
        stay.
        """
