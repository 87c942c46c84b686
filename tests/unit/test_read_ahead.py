"""Reading ahead of a loader: in order, each byte once, never too far, and it never stands in the
way."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from krea2_srt import read_ahead
from krea2_srt.read_ahead import ReadAhead, read_to_page_cache
from tests.throttled_disk import PATIENCE_S, UNLIMITED, ThrottledDisk

SIZE = 100


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a", "b", "c")]
    for file in found:
        file.write_bytes(b"x" * SIZE)
    return found


@pytest.fixture(autouse=True)
def rarely_checked(monkeypatch):
    """Only what tests do wakes a reader that has paused."""
    monkeypatch.setattr(read_ahead, "_RECHECK_S", PATIENCE_S)


@pytest.fixture
def started():
    """Starts read-aheads, and stops them in the end."""
    running = []

    def start(files, read, limit=UNLIMITED) -> ReadAhead:
        running.append(ReadAhead(files, read=read, limit=lambda: limit))
        running[-1].start()
        return running[-1]

    yield start
    for one in running:
        one.stop()


class Paused:
    """A limit that says when the reader has come to it.

    Args:
        room: bytes that may be read ahead.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._asked = threading.Semaphore(0)

    def __call__(self) -> int:
        self._asked.release()
        return self.room

    def wait(self, times: int) -> None:
        """Until it has been asked so many times more."""
        for _ in range(times):
            assert self._asked.acquire(timeout=PATIENCE_S)


class Loader(threading.Thread):
    """Waits for bytes of files, one after another, and records what has come by."""

    def __init__(self, ahead: ReadAhead, *wanted: tuple[Path, int]) -> None:
        super().__init__(daemon=True)
        self._ahead = ahead
        self._wanted = wanted
        self.loaded: list[tuple[str, int]] = []
        self.start()

    def run(self) -> None:
        for file, end in self._wanted:
            self._ahead.wait_for(file, end)
            self.loaded.append((file.name, end))

    def done(self) -> list[tuple[str, int]]:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.loaded


def test_each_byte_is_read_once_and_in_order(files, started):
    disk = ThrottledDisk(UNLIMITED)
    ahead = started(files, disk)
    for file in files:
        ahead.wait_for(file, SIZE)
    assert disk.order(files) == ["a", "b", "c"]
    for file in files:
        assert disk.bytes_of(file) == list(range(SIZE))


def test_a_loader_waits_for_its_own_bytes_only(files, started):
    disk = ThrottledDisk(30)
    loader = Loader(started(files, disk), (files[0], 25), (files[0], 31))
    disk.wait_until_starving()
    assert loader.is_alive()
    disk.allow(10)
    assert loader.done() == [("a", 25), ("a", 31)]
    disk.wait_until_starving()
    assert disk.bytes_of(files[0]) == list(range(40))


def test_all_within_the_limit_is_read_before_anybody_loads(files):
    """As while SGLang is being imported; then it stays that far ahead of the loader."""
    disk, limit = ThrottledDisk(UNLIMITED), Paused(150)
    ahead = ReadAhead(files, read=disk, limit=limit)
    ahead.start()
    limit.wait(16)  # before each of 15 pieces, and when there is no more room
    assert [len(disk.bytes_of(file)) for file in files] == [100, 50, 0]
    ahead.wait_for(files[0], 60)
    limit.wait(7)
    assert [len(disk.bytes_of(file)) for file in files] == [100, 100, 10]
    ahead.wait_for(files[2], SIZE)
    assert disk.bytes_of(files[2]) == list(range(SIZE))


def test_no_limit_stops_what_a_loader_waits_for(files, started):
    disk = ThrottledDisk(UNLIMITED)
    loader = Loader(started(files, disk, 0), *((file, SIZE) for file in files))
    assert len(loader.done()) == 3
    assert [disk.bytes_of(file) for file in files] == [list(range(SIZE))] * 3


def test_a_loader_with_another_order_gets_its_file_next(files, started):
    disk = ThrottledDisk(20)
    a, b, c = files
    ahead = started(files, disk)
    disk.wait_until_starving()
    ahead.wait_for(c, 0)
    disk.allow()
    loader = Loader(ahead, (c, SIZE), (b, SIZE), (a, SIZE))
    assert [name for name, _ in loader.done()] == ["c", "b", "a"]
    assert disk.order(files) == ["a", "c", "b", "a"]
    assert [disk.bytes_of(file) for file in files] == [list(range(SIZE))] * 3


def test_what_the_loader_has_passed_over_is_not_read(files):
    disk, limit = ThrottledDisk(UNLIMITED), Paused(30)
    a, b, c = files
    ahead = ReadAhead(files, read=disk, limit=limit)
    ahead.start()
    limit.wait(4)
    ahead.wait_for(c, SIZE)
    ahead.stop()
    assert [len(disk.bytes_of(file)) for file in (a, b, c)] == [30, 0, SIZE]


def test_a_file_that_has_grown_is_not_waited_for_without_end(files, started):
    """As one that was still being copied when reading began."""
    ahead = started(files, ThrottledDisk(UNLIMITED), 0)
    with files[0].open("ab") as grown:
        grown.write(b"x" * SIZE)
    assert Loader(ahead, (files[0], 2 * SIZE)).done() == [("a", 2 * SIZE)]


def test_a_file_by_another_path_is_the_same_file(files, started, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(files[0])
    disk = ThrottledDisk(UNLIMITED)
    ahead = started([files[0], link, files[1]], disk)
    assert ahead.covers([link])
    ahead.wait_for(link, SIZE)
    ahead.wait_for(files[1], SIZE)
    assert disk.bytes_of(files[0]) == list(range(SIZE))


def test_other_files_are_not_waited_for(files, started):
    ahead = started(files[:1], ThrottledDisk(0))
    ahead.wait_for(files[1], SIZE)
    ahead.wait_for(files[0].with_name("nowhere"), SIZE)


def test_an_error_lets_the_loader_meet_it(files, started):
    def broken(descriptor: int, start: int, count: int) -> int:
        raise OSError("input/output error")

    ahead = started(files, broken)
    for file in files:
        ahead.wait_for(file, SIZE)
    assert ahead.stop().bytes_read == 0


def test_a_file_that_has_been_cut_off_ends_it(files):
    ahead = ReadAhead(files, limit=lambda: UNLIMITED)
    os.truncate(files[0], 40)
    ahead.start()
    ahead.wait_for(files[0], SIZE)
    ahead.wait_for(files[1], SIZE)
    assert ahead.stop().bytes_read == 40


def put_a_file(path: Path) -> None:
    path.with_name("new").write_bytes(b"y" * SIZE)
    path.with_name("new").replace(path)


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("replace", [put_a_file, put_a_pipe, Path.unlink])
def test_what_has_taken_a_files_place_is_not_read(files, replace):
    ahead = ReadAhead(files, limit=lambda: UNLIMITED)
    replace(files[0])
    ahead.start()
    for file in files:
        ahead.wait_for(file, SIZE)
    assert ahead.stop().bytes_read == 0


def test_only_regular_files_are_read(files, started, tmp_path):
    put_a_pipe(files[0])
    files[1].unlink()
    ahead = started([tmp_path, *files, Path(os.devnull)], read_to_page_cache)
    ahead.wait_for(files[2], SIZE)
    ahead.wait_for(files[0], SIZE)
    assert ahead.stop().bytes_read == SIZE


def test_stopped_it_reads_nothing_more_and_nobody_waits(files, started):
    disk = ThrottledDisk(20)
    ahead = started(files, disk)
    loader = Loader(ahead, (files[2], SIZE))
    disk.wait_until_starving()
    ahead.stop()
    assert loader.done() == [("c", SIZE)]
    disk.allow()
    ahead._thread.join(PATIENCE_S)
    # What was under way when it was stopped, and no more.
    assert sum(end - start for _, start, end in disk.reads) <= 30


def test_what_is_read_is_in_the_page_cache(tmp_path):
    file, content = tmp_path / "weights", os.urandom(300_000)
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def cached() -> int:
        try:
            return os.preadv(descriptor, [bytearray(len(content))], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0

    try:
        if cached():
            pytest.skip("this file system keeps all in memory")
        assert read_to_page_cache(descriptor, 0, len(content)) == len(content)
        assert cached() == len(content)
        assert read_to_page_cache(descriptor, 200_000, len(content)) == 100_000
        assert read_to_page_cache(descriptor, len(content), 10) == 0
    finally:
        os.close(descriptor)


def test_a_forked_process_waits_for_nobody(files):
    code = f"""
import os, signal
from pathlib import Path
from krea2_srt import read_ahead
file = Path({str(files[0])!r})
read_ahead._current = read_ahead.ReadAhead([file], limit=lambda: 0)
read_ahead._current.start()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends the child, should it wait
    read_ahead.wait_for(file, {SIZE})
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_an_interpreter_ends_beside_a_disk_that_hangs(files):
    code = f"""
import threading
from pathlib import Path
from krea2_srt.read_ahead import ReadAhead
reading = threading.Event()
def hang(*_):
    reading.set()
    threading.Event().wait()
ReadAhead([Path({str(files[0])!r})], read=hang).start()
reading.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


@pytest.fixture
def process_wide(monkeypatch):
    """Threads that do not start, in place of this process's; those that were begun."""
    begun = []

    class Begun(ReadAhead):
        def start(self) -> None:
            begun.append(self)

    monkeypatch.setattr(read_ahead, "ReadAhead", Begun)
    yield begun
    read_ahead.finish()


def test_a_process_begins_once(files, process_wide):
    read_ahead.begin(files)
    read_ahead.begin(files[1:])
    assert len(process_wide) == 1


def test_other_files_take_the_place_of_the_first_ones(files, process_wide):
    read_ahead.begin(files[:2])
    read_ahead.begin(files)
    first, second = process_wide
    first.wait_for(files[0], SIZE)  # it has been stopped: nobody waits
    assert second.covers(files)


def test_finished_nothing_is_waited_for(files, process_wide):
    read_ahead.begin(files)
    assert read_ahead.finish().bytes_read == 0
    read_ahead.wait_for(files[0], SIZE)
    assert read_ahead.finish().seconds == 0
    read_ahead.begin(files)
    assert len(process_wide) == 2
