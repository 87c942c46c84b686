"""What the engine counts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Counters:
    """Totals since the engine started. accepted = done + failed + cancelled + what is in it.

    Attributes:
        accepted, done, failed, cancelled, refused: requests. Refused ones were not accepted.
        sequences_done: images.
        turns: units of work.
        busy_s: seconds spent in them.
        encode_s, step_s, decode_s: of these, by the kind of work. A decode beside the steps counts
            only where the engine looks after it.
        longest_turn_ms: the longest of them.
        steps: steps of sequences.
        packs: steps of packs.
        tokens: stepped.
        out_of_memory: times that memory ran out.
        retried: sequences whose pack failed and that were run again.
    """

    accepted: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    sequences_done: int = 0
    turns: int = 0
    busy_s: float = 0.0
    encode_s: float = 0.0
    step_s: float = 0.0
    decode_s: float = 0.0
    longest_turn_ms: float = 0.0
    steps: int = 0
    packs: int = 0
    tokens: int = 0
    out_of_memory: int = 0
    retried: int = 0

    @property
    def ended(self) -> int:
        return self.done + self.failed + self.cancelled

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
