"""The folder against a model of it: whatever happens, what is counted is what is there."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from krea2_server.storage.image_folder import ImageFolder
from krea2_server.storage.signatures import new_name
from krea2_server.storage.store import StorageFullError

LIMIT = 100


class FolderMachine(RuleBasedStateMachine):
    """Files come with any expiry and size, time passes, the server is started again."""

    def __init__(self):
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.path = Path(self.temporary.name)
        self.now = 1000.0
        self.expected: list[tuple[int, str, int]] = []
        """When it goes, its name and size in bytes, first to go first."""
        self.folder = ImageFolder(self.path, LIMIT)
        self.folder.open(self.now)

    def teardown(self):
        self.temporary.cleanup()

    def expire(self):
        self.expected = [file for file in self.expected if file[0] > self.now]

    @rule(size=st.integers(0, 120), life_s=st.integers(1, 50))
    def add(self, size, life_s):
        # No two at a time: after a restart in between, which is the older is anybody's guess.
        expires = int(self.now) + life_s
        while any(expires == file[0] for file in self.expected):
            expires += 1
        name = new_name("png")
        if size > LIMIT:
            with pytest.raises(StorageFullError):
                self.folder.add(name, expires, b"x" * size, self.now)
            return
        self.expire()
        while sum(file[2] for file in self.expected) + size > LIMIT:
            self.expected.pop(0)
        self.expected = sorted([*self.expected, (expires, name, size)])
        self.folder.add(name, expires, b"x" * size, self.now)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def sweep(self):
        self.expire()
        self.folder.remove_expired(self.now)

    @rule(limit=st.sampled_from([LIMIT, 50]))
    def restart(self, limit):
        self.expire()
        while sum(file[2] for file in self.expected) > limit:
            self.expected.pop(0)
        ImageFolder(self.path, limit).open(self.now)
        self.folder = ImageFolder(self.path, LIMIT)
        self.folder.open(self.now)

    @invariant()
    def what_is_counted_is_there(self):
        there = {file.name: file.stat().st_size for file in self.path.iterdir()}
        assert there == {f"{expires}-{name}": size for expires, name, size in self.expected}
        assert self.folder.num_bytes == sum(there.values()) <= LIMIT
        for expires, name, _ in self.expected:
            assert is_there(self.folder, name, expires)


def is_there(folder, name, expires):
    if (file := folder.open_file(name, expires)) is None:
        return False
    file.close()
    return True


TestFolder = FolderMachine.TestCase
TestFolder.settings = settings(stateful_step_count=30)


def test_images_that_expire_together_go_in_the_order_of_writing(tmp_path):
    folder = ImageFolder(tmp_path, 30)
    folder.open(0)
    names = [new_name("png") for _ in range(6)]
    for age, name in enumerate(names[:3]):
        folder.add(name, 100, b"0123456789", 0)
        os.utime(tmp_path / f"100-{name}", (age, age))
    folder = ImageFolder(tmp_path, 30)
    folder.open(0)
    for number, name in enumerate(names[3:]):
        folder.add(name, 100, b"0123456789", 0)
        there = [is_there(folder, name, 100) for name in names]
        assert there == [number < age <= number + 3 for age in range(6)]


def test_the_folder_is_nobody_elses_to_read(tmp_path):
    ImageFolder(tmp_path / "images", 1).open(0)
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o700


def test_where_a_group_may_write_the_folder_is_the_groups(tmp_path):
    """The next start may be another user of it, as in a container whose user is any number."""
    tmp_path.chmod(0o775)
    umask = os.umask(0o002)
    try:
        ImageFolder(tmp_path / "images", 1).open(0)
    finally:
        os.umask(umask)
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o770
