"""How figures were made: what every file of results says of itself."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(command: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """Command, date, machine and versions; no names of machines or people.

    Args:
        command: as somebody would type it.
        packages: whose versions matter, those that are installed.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "versions": versions,
    }


def typed(command: str) -> list[str]:
    """The command line of this process, with a name in place of its file."""
    return [command, *sys.argv[1:]]


def cpu_name() -> str:
    """The processor's kind, as the kernel names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _gpus() -> list[str]:
    """Names of NVIDIA's, by their driver's own tool: torch may not be here, and is slow to load."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.split("\n")[:-1]
    return []
