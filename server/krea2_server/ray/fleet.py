"""The engine replicas as one HTTP process knows them: who is there, and what each has to do."""

import time
import uuid
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from krea2_srt.request import AdapterChoice
from krea2_srt.routing import OutstandingWork, WorkEntry, adapters_ms

SOURCE = uuid.uuid4().hex
"""This process, among those that send to the same replicas."""

SUSPECT_S = 3.0
"""Longer than a report takes to get here: the first that counts again is new."""


@dataclass
class Member:
    """A replica.

    Attributes:
        load: what this process has sent there.
        report: what it last said of itself; see `EngineReplica.record_routing_stats`.
        suspect_until: clock time in seconds; until then it does not generate, whatever it has said.
    """

    load: OutstandingWork = field(default_factory=OutstandingWork)
    report: Mapping[str, Any] = field(default_factory=dict)
    suspect_until: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether it generates. One that has said nothing has just started, and starts ready."""
        return bool(self.report.get("ready", True)) and time.monotonic() >= self.suspect_until

    @property
    def adapters(self) -> Mapping[str, tuple[str, int]]:
        """Where it has adapters; see `krea2_srt.routing.adapters_ms`."""
        found: Mapping[str, tuple[str, int]] = self.report.get("statistics", {}).get("adapters", {})
        return found

    @property
    def other_routers_ms(self) -> int:
        """Work there that other processes have sent, as of its last report."""
        sent: Mapping[str, int] = self.report.get("outstanding_ms", {})
        return sum(work for source, work in sent.items() if source != SOURCE)


class Fleet:
    """All replicas, and where each of our requests is.

    Written by the router's thread, read by others: what they read is replaced, not changed.
    """

    def __init__(self) -> None:
        self.members: dict[Hashable, Member] = {}
        self._entries: dict[str, tuple[Hashable, WorkEntry]] = {}
        self._turn: dict[Hashable, int] = {}

    def update(self, reports: Mapping[Hashable, Mapping[str, Any]]) -> None:
        """These replicas are there, no others, and say this."""
        members = {}
        for replica, report in reports.items():
            member = self.members.get(replica) or Member()
            member.report = report
            members[replica] = member
        self.members = members
        self._turn = {replica: self._turn.get(replica, 0) for replica in members}

    def drop(self, replica: Hashable) -> None:
        """It has died."""
        self.members = {other: it for other, it in self.members.items() if other != replica}

    def mark_suspect(self, replica: Hashable) -> None:
        """It has just refused a request, as its engine was away: its last report is old."""
        if (member := self.members.get(replica)) is not None:
            member.suspect_until = time.monotonic() + SUSPECT_S

    def ranking(
        self,
        work: int,
        candidates: Sequence[Hashable],
        adapters: Collection[AdapterChoice] = (),
    ) -> list[Hashable]:
        """The candidates, first the one where a request of ``work`` ms adds least to what all wait.

        See `OutstandingWork.added_wait`. Of work that others have sent only the sum is known: the
        request waits for all of it. Replicas that are not ready come last.

        Args:
            work: estimated milliseconds.
            candidates: those to choose from.
            adapters: that it needs, for which it waits where they are not on the device.
        """

        def wait(replica: Hashable) -> tuple[bool, int, int, int]:
            member = self.members.get(replica) or Member()
            load, others_ms = member.load, member.other_routers_ms
            added = load.added_wait(work) + others_ms + adapters_ms(adapters, member.adapters)
            turn = self._turn.get(replica, 0)
            return not member.ready, added, load.outstanding + others_ms, turn

        return sorted(candidates, key=wait)

    def place(self, request: str, replica: Hashable, work: int) -> None:
        """A request goes to a replica, or to this one after all."""
        self.remove(request)
        if (member := self.members.get(replica)) is not None:
            self._entries[request] = replica, member.load.add(work)
            # Equal replicas take turns: the one that was chosen last comes last.
            self._turn[replica] = max(self._turn.values(), default=0) + 1

    def remove(self, request: str, replica: Hashable | None = None) -> None:
        """It has ended; of one that is not there, or on another replica by now, nothing happens."""
        found = self._entries.get(request)
        if found is None or (replica is not None and found[0] != replica):
            return
        del self._entries[request]
        if (member := self.members.get(found[0])) is not None:
            member.load.remove(found[1])

    def __contains__(self, request: str) -> bool:
        return request in self._entries

    def ahead(self, request: str) -> int:
        """How many of our requests will probably be generated there before it."""
        found = self._entries.get(request)
        if found is None:
            return 0
        replica, entry = found
        member = self.members.get(replica)
        return member.load.ahead(entry) if member is not None else 0


_FLEET = Fleet()


def fleet_of_this_process() -> Fleet:
    """Ray Serve makes the router and shows it to nobody, so what it knows is kept here.

    A function, since Ray sends routers and deployments by value, with copies of the objects that
    they refer to.
    """
    return _FLEET
