"""The DiT's modulation of schedules, of which a sequence needs one row at a time.

All rows of a schedule are computed at once, which reads the weights once, and remembered one by
one. A sequence holds none: what is in use is bounded by the cache and the rows of a pack.
"""

from collections.abc import Callable, Hashable

from krea2_srt.model.modulation import Modulation
from krea2_srt.model.schedule import Schedule
from krea2_srt.runner.byte_cache import ByteCache

ModulationRows = ByteCache[tuple[Schedule, Hashable, int], Modulation]


class ScheduleModulation:
    """The modulation of one schedule, a row per step.

    Args:
        schedule: which.
        rows: where they are remembered, by step.
        make: computes all rows of a schedule.
        variant: what else the rows depend on.
    """

    def __init__(
        self,
        schedule: Schedule,
        rows: ModulationRows,
        make: Callable[[Schedule], Modulation],
        variant: Hashable = None,
    ) -> None:
        self._schedule = schedule
        self._rows = rows
        self._make = make
        self._variant = variant

    def row(self, step: int) -> Modulation:
        """The modulation of one step: remembered, or computed with all others."""
        found = self._rows.get((self._schedule, self._variant, step))
        return self._computed(step) if found is None else found

    def release(self) -> None:
        """Let go of what the rows are computed from; none is asked for any more."""
        self._make = _released

    def _computed(self, step: int) -> Modulation:
        made = self._make(self._schedule)
        # Copies, or each row would keep all of them alive. This one last: a small cache keeps it.
        for other in (*range(step), *range(step + 1, self._schedule.steps), step):
            row = Modulation(*(tensor.clone() for tensor in made.row(other).tensors))
            self._rows.put((self._schedule, self._variant, other), row)
        return row


def _released(schedule: Schedule) -> Modulation:
    raise RuntimeError(f"the modulation of {schedule.steps} steps is released")
