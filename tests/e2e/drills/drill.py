"""What a drill is: a breakage, and what must come of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from krea2_srt.testing.load import DONE, PHASES, VANISHED, Load, ended_by_server
from tests.e2e.drills.deployment import Deployment


class DrillFailedError(Exception):
    """What the guide says did not come true."""


@dataclass(frozen=True)
class Drill:
    """A drill.

    Attributes:
        name: as on the command line.
        breaks: what is broken.
        promise: what then must be true, as docs/operations.md says it.
        run: given a running `Deployment` without further flags, which may have been through other
            drills; it goes on after this one, unless it has ended by it.
        run_alone: of one that has servers of its own: given the checkpoint's folder and one for its
            files.
        needs_root: whether only root can do it.
        needs: a program that must be installed.
    """

    name: str
    breaks: str
    promise: str
    run: Callable[[Deployment], None] | None = None
    run_alone: Callable[[Path, Path], None] | None = None
    needs_root: bool = False
    needs: str | None = None


def check(condition: bool, promise: str) -> None:
    """Raise unless a promise is kept."""
    if not condition:
        raise DrillFailedError(promise)


@contextmanager
def under_load(deployment: Deployment, load: Load) -> Iterator[Load]:
    """Clients at work, a few of them done already. At the end it prints what became of them all.

    Raises:
        DrillFailedError: a request has vanished, or the server counts others than its clients.
    """
    before = ended_by_server(deployment.url)
    with load.running():
        load.wait_for(3)
        yield load
    print_counts(load)
    check(not load.counts()[VANISHED], "every request ends in an image or an error")
    if deployment.server.is_running():
        _compare(load, before, ended_by_server(deployment.url))


def print_counts(load: Load) -> None:
    """Requests by phase and outcome."""
    outcomes = sorted({it.outcome for it in load.ended})
    width = max(map(len, outcomes), default=0)
    print(f"  {'':{width}}" + "".join(f"{phase:>9}" for phase in PHASES))
    for outcome in outcomes:
        counts = "".join(f"{load.counts(phase)[outcome]:9}" for phase in PHASES)
        print(f"  {outcome:{width}}{counts}")


def _compare(load: Load, before: dict[str, int], after: dict[str, int]) -> None:
    """The server's own count of images against the clients'."""
    done = after.get("done", 0) - before.get("done", 0)
    seen = load.counts()[DONE]
    check(done >= seen, f"the server counts what its clients got: {done}, {seen}")
