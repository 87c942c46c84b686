"""The sources of a figure: the commit, and a hash of what the benchmark runs."""

import hashlib
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_FOLDERS = ("krea2_srt", "benchmarks")
_ENDINGS = (".py", ".json")
_RESULTS = ROOT / "benchmarks" / "results"


def sources(root: Path = ROOT) -> dict[str, str | None]:
    """``commit``, None where there is no git, and ``hash``, which knows a changed tree."""
    return {"commit": _commit(root), "hash": _hash(root)}


def _commit(root: Path) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip()
    return None


def _hash(root: Path) -> str:
    files = [
        file
        for folder in _FOLDERS
        for file in (root / folder).rglob("*")
        if file.suffix in _ENDINGS and _RESULTS not in file.parents and file.is_file()
    ]
    found = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()[:16]
