"""A part of a core for a process, and no more: what others leave is not its to use.

Replicas that share cores would also share what a bad router leaves idle on one of them, as no two
machines do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

_PERIOD_US = 20_000
_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def limited(processes: Sequence[int], cores: float) -> Iterator[None]:
    """Give each of these processes, with its threads, so much of a core while this is entered.

    Args:
        processes: ids.
        cores: for each.

    Raises:
        OSError: control groups cannot be made here; root can, where the machine lets it.
    """
    root = _V1 if (_V1 / "cpu.cfs_quota_us").exists() else _V2
    quota_us = round(cores * _PERIOD_US)
    groups = [root / f"krea2-{process}" for process in processes]
    try:
        for group, process in zip(groups, processes, strict=True):
            group.mkdir()
            if root == _V1:
                (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))
            else:
                (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
            (group / "cgroup.procs").write_text(str(process))
        yield
    finally:
        for group, process in zip(groups, processes, strict=True):
            if group.exists():
                if psutil.pid_exists(process):
                    (root / "cgroup.procs").write_text(str(process))
                group.rmdir()
