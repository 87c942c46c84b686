"""The entry point as the image runs it: another user, a read-only root, no rights."""

from pathlib import Path

import pytest

from tests.e2e.drills.deployment import Deployment
from tests.e2e.restricted import restricted


@pytest.mark.slow
def test_it_serves_and_ends_with_nothing_to_write_to_but_its_cache(demo_model, tmp_path):
    wrapper = restricted("10001:0", demo_model)
    flags = ["--storage", "/srv/cache/images", "--log-format", "text"]
    with Deployment(Path("/srv/model"), tmp_path, flags, wrapper) as deployment:
        process = deployment.server
        assert (set(process.uids()), set(process.gids())) == ({10001}, {0})
        status = (Path("/proc") / str(process.pid) / "status").read_text()
        assert "NoNewPrivs:\t1\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        answer = deployment.generate(size="64x64", response_format="url")
        assert answer.status_code == 200, answer.text
        deployment.terminate()
        assert deployment.wait() == 0, deployment.log[-2000:]
    assert "Read-only file system" not in deployment.log
    assert "Permission denied" not in deployment.log
