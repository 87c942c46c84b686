"""How much memory this process can still use: the machine's, or a container's where it is less."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_V1_LIMIT, _V1_USED = "memory.limit_in_bytes", "memory.usage_in_bytes"
_V2_LIMIT, _V2_USED = "memory.max", "memory.current"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping; files in the page cache give way, so they count.

    Args:
        root: where /proc and /sys are.
    """
    found = [_of_the_machine(root)]
    for group in _groups(root):
        for limit, used in ((_V2_LIMIT, _V2_USED), (_V1_LIMIT, _V1_USED)):
            # "max" is no limit, and a group of the other version has no such files.
            with suppress(OSError, ValueError):
                left = int((group / limit).read_text()) - int((group / used).read_text())
                found.append(max(0, left + _cached(group)))
    return min(found)


def _of_the_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _groups(root: Path) -> Iterator[Path]:
    """Control groups that hold this process, the innermost first; each one's limit counts."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's, of which only the container's own is there.
        yield from (mounted / one for one in (inner, *inner.parents) if (mounted / one).is_dir())


def _cached(group: Path) -> int:
    """Bytes of files that the group has in the page cache; 0 where nothing tells, as in gVisor."""
    try:
        values = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 counts its subgroups apart.
    prefix = "total_" if "total_inactive_file" in values else ""
    return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
