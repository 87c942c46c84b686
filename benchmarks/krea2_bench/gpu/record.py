"""``rows.jsonl``: every entry as it comes, so that a run that is killed loses none.

The first line says of which sources, machine and versions the others are. A line is whole or it
does not count.
"""

import json
import os
from pathlib import Path
from typing import Any

from krea2_bench.gpu.rows import Entry, Findings

NAME = "rows.jsonl"
OLDER = "rows.before.jsonl"
"""Where the file of an earlier run goes when another run begins in its folder."""

Header = dict[str, Any]
"""``sources``, see `krea2_bench.gpu.sources`, ``machine`` and ``smoke``."""


class Record:
    """The file of one run.

    Args:
        folder: where it lies.
        header: of this run.
        taken: entries of an earlier run, to begin with.
    """

    def __init__(self, folder: Path, header: Header, taken: list[Entry]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, new = folder / NAME, folder / f"{NAME}.new"
        with new.open("wb") as file:
            for entry in ({"kind": "header", **header}, *taken):
                file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            # Under both names until the new one takes its own, so that there is always one.
            older = folder / OLDER
            older.unlink(missing_ok=True)
            os.link(path, older)
        os.replace(new, path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, entry: Entry) -> None:
        """One more line; what was found is on the disk when this returns."""
        os.write(self._file, _line(entry))
        if entry["kind"] in ("row", "missing"):  # without the others a part runs again, no more
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read(folder: Path) -> tuple[Header, list[Entry]] | None:
    """Header and entries of a run, as far as it came; None where there is none."""
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return None
    entries = [json.loads(line) for line in data.split(b"\n")[:-1]]  # the last one may be torn
    if not entries or entries[0].get("kind") != "header":
        raise ValueError(f"{folder / NAME}: does not begin with a header")
    header = {name: value for name, value in entries[0].items() if name != "kind"}
    return header, entries[1:]


def findings_of(entries: list[Entry]) -> Findings:
    """What the entries of a file say together."""
    found = Findings()
    for entry in entries:
        found.take(entry)
    return found


def differences(ours: Header, theirs: Header) -> list[str]:
    """Why the rows of another run are not this one's; empty where they are."""
    found = []
    for name in ("smoke", "sources", "machine"):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            for key in sorted(mine.keys() | other.keys()):
                # A copy without its history has the same sources, if their hash is the same.
                unknown = key == "commit" and None in (mine.get(key), other.get(key))
                if mine.get(key) != other.get(key) and not unknown:
                    found.append(f"{key} was {other.get(key)}, is {mine.get(key)}")
        elif mine != other:
            found.append(f"{name} was {other}, is {mine}")
    return found


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"
