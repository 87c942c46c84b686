"""Every drill, as `make drills` runs it: several minutes."""

import os

import pytest

from tests.e2e.drills.__main__ import DRILLS, missing


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_what_the_guide_promises_is_kept(name, demo_model, tmp_path):
    if (reason := missing(DRILLS[name])) and not os.environ.get("CI"):
        pytest.skip(reason)
    DRILLS[name].run(demo_model, tmp_path / name)
