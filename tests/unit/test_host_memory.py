"""Memory that is left, by the machine's own word and by that of control groups of either kind."""

from pathlib import Path

import pytest

from krea2_srt.host_memory import available_memory

MACHINE = 8_000_000 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8 GB left and no control groups."""
    write(tmp_path / "proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    return tmp_path


def write(file: Path, text: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}")


def group(folder: Path, limit: object, used: int, version: int = 2, cached: int = 300) -> None:
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        write(folder / name, f"{value}\n")
    files = f"active_file {cached - 100}\ninactive_file 100\n"
    # Version 1 has these beside its own, without what subgroups have.
    totals = f"total_active_file {cached - 100}\ntotal_inactive_file 100\n"
    write(
        folder / "memory.stat", f"anon 5\n{files}" if version == 2 else f"active_file 1\n{totals}"
    )


def test_without_a_limit_it_is_the_machines(root):
    assert available_memory(root) == MACHINE
    write(root / "proc/self/cgroup", "0::/user/one\n")
    group(root / "sys/fs/cgroup/user/one", "max", 10**6)
    assert available_memory(root) == MACHINE


@pytest.mark.parametrize("path", ["", "outer", "outer/inner"])
def test_the_narrowest_limit_counts_whoever_has_it(root, path):
    write(root / "proc/self/cgroup", "0::/outer/inner\n")
    for each in ("outer", "outer/inner"):
        group(root / "sys/fs/cgroup" / each, 10**9, 0)
    group(root / "sys/fs/cgroup" / path, 10**6, 400_000)
    assert available_memory(root) == 600_300


def test_the_first_version_of_groups(root):
    write(root / "proc/self/cgroup", "9:cpu:/other\n4:memory:/docker/1\n0::/\n")
    group(root / "sys/fs/cgroup/memory/docker/1", 10**6, 900_000, version=1)
    assert available_memory(root) == 100_300


def test_a_containers_own_group_is_where_it_is_mounted(root):
    """Its path is the host's."""
    write(root / "proc/self/cgroup", "0::/kubepods/pod1\n")
    group(root / "sys/fs/cgroup", 10**6, 10**6)
    assert available_memory(root) == 300


def test_more_may_be_used_than_the_limit_for_a_moment(root):
    write(root / "proc/self/cgroup", "0::/\n")
    group(root / "sys/fs/cgroup", 10**6, 10**7)
    assert available_memory(root) == 0


@pytest.mark.parametrize("told", [None, "", "no numbers here", "anon 5"])
def test_a_limit_counts_where_nothing_tells_of_the_page_cache(root, told):
    write(root / "proc/self/cgroup", "0::/\n")
    folder = root / "sys/fs/cgroup"
    group(folder, 10**6, 400_000)
    (folder / "memory.stat").unlink()
    if told is not None:
        write(folder / "memory.stat", told)
    assert available_memory(root) == 600_000


def test_this_machine_has_some():
    assert 2**20 < available_memory() < 2**50
