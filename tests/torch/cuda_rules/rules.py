"""The rules by name, and the error that says which one was broken."""

from enum import Enum


class Rule(Enum):
    """What CUDA, or torch's allocator over it, asks of those who use it."""

    HOST_READ = "host read or synchronising copy in a capture"
    PAGEABLE = "copy of pageable memory in a capture"
    WAIT = "synchronisation in a capture"
    POOL = "pool of a graph"
    RACE = "use without an order between streams"
    LIFETIME = "memory handed out while another stream uses it"
    PINNED = "pinned memory used before the copy is done"
    PLAN = "plan of a library first built in a capture"
    RELEASED = "memory of a graph used after its release"
    OUTSIDE = "work or memory of a capture outside of it"
    DIFFERENT = "capture of something else than was warmed up"
    INPUT = "memory that a graph reads or writes is gone"


class CudaError(RuntimeError):
    """What CUDA says itself, perhaps because of an earlier error."""


class RuleError(CudaError):
    """A rule was broken."""

    def __init__(self, rule: Rule, text: str) -> None:
        super().__init__(f"CUDA error: {rule.value}: {text}")
        self.rule = rule
