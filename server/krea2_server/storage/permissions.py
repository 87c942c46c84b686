"""Who may read what only this server should: its user, or the group that runs it."""

import stat
from pathlib import Path


def private_mode(folder: Path, mode: int) -> int:
    """The mode of what is made in a folder and nobody else's.

    A group that may write the folder could put in place of it what it likes: it is the group's
    then, so that the next start may be another of its users, as OpenShift chooses them.

    Args:
        folder: that is there.
        mode: the user's part, 0o600 or 0o700.
    """
    shared = folder.stat().st_mode & stat.S_IWGRP
    return mode | mode >> 3 if shared else mode
