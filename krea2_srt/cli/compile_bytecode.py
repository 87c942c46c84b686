"""Compiles all that this Python can import, for an image whose file system is read-only.

What is not compiled when the image is built would be at each of its starts, half a minute of it.
Plain bytecode, by the time of the source: layers keep times, and where a builder sets
SOURCE_DATE_EPOCH, Python marks it by the source's hash.
"""

import compileall
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec

NEEDED = ("krea2_server", "krea2_srt", "sglang", "torch")
"""Without bytecode of these something is wrong."""

TESTS = re.compile(r"[/\\]tests?[/\\]")
"""What nobody imports; a tenth of all."""


def folder_of(package: str) -> list[str]:
    """Where a package is, if it is there."""
    spec = find_spec(package)
    return list((spec and spec.submodule_search_locations) or ())


def compile_all(folders: Sequence[str]) -> None:
    """As many files at a time as there are cores; what is compiled already stays."""
    for folder in filter(os.path.isdir, folders):
        # Packages carry templates that are no Python; nobody imports those.
        compileall.compile_dir(folder, quiet=2, rx=TESTS, workers=0)


def without_bytecode(packages: Sequence[str]) -> list[str]:
    specs = {name: find_spec(name) for name in packages}
    return [
        name
        for name, spec in specs.items()
        if spec is None or spec.cached is None or not os.path.exists(spec.cached)
    ]


if __name__ == "__main__":
    # SGLang's own image has SGLang where it was built, which need not be on the path.
    compile_all([*sys.path[1:], *folder_of("sglang")])
    if missing := without_bytecode(NEEDED):
        sys.exit(f"compile_bytecode: no bytecode of {', '.join(missing)}")
