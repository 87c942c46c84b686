"""Programs that pip cannot install: without them a test is skipped, and fails in CI."""

import os
import shutil

import pytest


def required(program: str) -> str:
    """Where a program is."""
    path = shutil.which(program)
    if path is None:
        reason = f"no {program} is installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
