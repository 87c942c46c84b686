"""From sequences that step together to what their forward reads, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack
from krea2_srt.runner.packing import SequenceShape
from krea2_srt.runner.sequence import DenoisingSequence


@dataclass(frozen=True)
class ForwardBatch:
    """The forwards that a pack of sequences needs: one each, two under guidance.

    Attributes:
        sequences: the pack, each at its own step.
        shapes: of each branch.
        contexts: [text tokens, hidden] of each branch.
        owners: the sequence of each branch.
        first: the first branch of each sequence.
    """

    sequences: Sequence[DenoisingSequence]
    shapes: tuple[SequenceShape, ...]
    contexts: tuple[Tensor, ...]
    owners: "tuple[DenoisingSequence, ...]"
    first: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[DenoisingSequence]) -> "ForwardBatch":
        """The branches of these sequences, in order; a negative prompt's follows its own."""
        shapes: list[SequenceShape] = []
        contexts: list[Tensor] = []
        owners: list[DenoisingSequence] = []
        first: list[int] = []
        for s in sequences:
            first.append(len(shapes))
            for context in s.branches:
                guided = context is s.context and s.negative_context is not None
                shapes.append(SequenceShape(len(context), s.rows, s.columns, guided))
                contexts.append(context)
                owners.append(s)
        return cls(sequences, tuple(shapes), tuple(contexts), tuple(owners), tuple(first))

    @property
    def dt(self) -> list[float]:
        """The Euler step of each branch: the difference of its sigmas."""
        return [s.schedule.sigmas[s.step + 1] - s.schedule.sigmas[s.step] for s in self.owners]

    @property
    def guidance(self) -> list[float]:
        """Guidance of each branch; 0 for a negative prompt's, whose velocity is left as it is."""
        pairs = zip(self.owners, self.shapes, strict=True)
        return [s.guidance if shape.guided else 0.0 for s, shape in pairs]

    @property
    def modulations(self) -> list[Modulation]:
        """One row for each branch, of its current step."""
        return [s.modulation.row(s.step) for s in self.owners]

    @property
    def tokens(self) -> list[Tensor]:
        """float32 [image tokens, channels] of each branch."""
        return [s.tokens for s in self.owners]

    def advance(self, pack: Pack, tokens: Tensor, velocity: Tensor, steps: int = 1) -> None:
        """Give every sequence what it is after some steps. Cannot fail: all step, or none.

        Args:
            pack: the layout.
            tokens, velocity: float32 [T, channels], of which the sequences keep parts.
            steps: done.
        """
        for s, branch in zip(self.sequences, self.first, strict=True):
            start, end = pack.image_spans[branch]
            s.tokens = tokens[start:end]
            s.velocity = velocity[start:end] if s.keep_velocity else None
            s.step += steps

    def non_finite(self, flags: list[int]) -> "list[DenoisingSequence]":
        """The sequences whose branch has a flag that is not 0."""
        return [s for s, branch in zip(self.sequences, self.first, strict=True) if flags[branch]]
