"""What pip cannot install, programs and rights: without it a test is skipped, and fails in CI."""

import os
import shutil
from typing import NoReturn

import pytest


def required(program: str) -> str:
    """Where a program is."""
    path = shutil.which(program)
    if path is None:
        _lacking(f"no {program} is installed")
    return path


def required_root() -> None:
    """See that the test runs as root, who can become somebody else."""
    if os.geteuid() != 0:
        _lacking("needs root, to become somebody else")


def _lacking(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
