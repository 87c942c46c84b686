"""Every drill, as `make drills` runs it: several minutes."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.drills.__main__ import DRILLS, missing
from tests.e2e.drills.performance import Drills


@pytest.fixture(scope="module")
def drills(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drills]:
    with closing(Drills(demo_model, tmp_path_factory.mktemp("drills"))) as drills:
        yield drills


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_what_the_guide_promises_is_kept(drills: Drills, name: str):
    if (reason := missing(DRILLS[name])) and not os.environ.get("CI"):
        pytest.skip(reason)
    drills.perform(DRILLS[name])
