"""What became of a request: a line of the results."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import orjson

from krea2_bench.load.plan import Planned

DONE = "done"
REJECTED = "rejected"
FAILED = "failed"
CANCELLED = "cancelled"
INTERRUPTED = "interrupted"


@dataclass
class Outcome:
    """Times are in seconds after the beginning of its point.

    Attributes:
        index: in its plan.
        size, work: see `krea2_bench.load.mix.Kind`.
        megapixels, n: of its images.
        steps, priority, seed, prompt_tokens: what it asked for.
        due_s: when it was to be sent.
        sent_s: when it was.
        preview_s: when the first picture on the way was there; None without one.
        done_s: when its answer was there, or it was clear that there would be none.
        outcome: `DONE`; `REJECTED`, by a 429; `FAILED`, with the `error`; `CANCELLED`, by its own
            client as planned; `INTERRUPTED`, by whoever ended the load test.
        status: of HTTP; 0 without an answer.
        error: why it failed.
        stage_ms: queue, encode, denoise, decode, where the server tells.
        request_id: the server's name of it, where it tells.
        num_bytes: of the encoded images.
    """

    index: int
    size: str
    work: str
    megapixels: float
    n: int
    steps: int | None
    priority: int
    seed: int
    prompt_tokens: int
    due_s: float
    sent_s: float
    done_s: float = 0.0
    preview_s: float | None = None
    outcome: str = INTERRUPTED
    status: int = 0
    error: str = ""
    stage_ms: dict[str, float] = field(default_factory=dict)
    request_id: str = ""
    num_bytes: int = 0

    @classmethod
    def begun(cls, planned: Planned, due_s: float, sent_s: float) -> "Outcome":
        """The outcome of a request that is about to be sent."""
        kind = planned.kind
        return cls(
            planned.index,
            kind.size,
            kind.work,
            kind.megapixels,
            kind.n,
            kind.steps,
            kind.priority,
            planned.seed,
            planned.prompt.tokens,
            due_s,
            sent_s,
        )

    @property
    def latency_s(self) -> float:
        """From when it was to be sent, so that a late client is not the server's gain."""
        return self.done_s - self.due_s

    @property
    def judged(self) -> bool:
        """Whether its end says something about the server."""
        return self.outcome in (DONE, REJECTED, FAILED)

    def shifted(self, seconds: float) -> "Outcome":
        """The same, so much later."""
        preview_s = None if self.preview_s is None else self.preview_s + seconds
        return replace(
            self,
            due_s=self.due_s + seconds,
            sent_s=self.sent_s + seconds,
            done_s=self.done_s + seconds,
            preview_s=preview_s,
        )

    def line(self, point: int, **where: Any) -> bytes:
        """A line of JSON, with the number of its point, and where else it belongs."""
        return orjson.dumps({"point": point, **where, **asdict(self)}) + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "tuple[dict[str, Any], Outcome]":
        """What `line` has written: where it belongs, and the outcome."""
        values: dict[str, Any] = orjson.loads(line)
        own = {f.name for f in fields(cls)}
        where = {name: value for name, value in values.items() if name not in own}
        return where, cls(**{name: value for name, value in values.items() if name in own})
