"""What Python has compiled and kept, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

SET = {"PYTHONDONTWRITEBYTECODE": "1"}
"""The environment of an image, or of a CI machine."""

NOT_SET = {"PYTHONDONTWRITEBYTECODE": ""}


def kept(folder: Path) -> set[Path]:
    """The files of bytecode below a folder that is a ``PYTHONPYCACHEPREFIX``."""
    return {file.relative_to(folder) for file in folder.rglob("*.pyc")}


def before_the_first_line(folder: Path) -> set[Path]:
    """What Python has loaded by the time that krea2-serve can say that bytecode is kept.

    Args:
        folder: an empty one.
    """
    environment = {**os.environ, **NOT_SET, "PYTHONPYCACHEPREFIX": str(folder)}
    subprocess.run(
        [sys.executable, "-c", "import krea2_server.__main__"], env=environment, check=True
    )
    return kept(folder)
