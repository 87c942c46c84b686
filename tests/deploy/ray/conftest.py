"""A Ray cluster of this machine, with the application on it, once for all slow tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.ray_serve.cluster import LocalCluster
from tests.server.serving import Api


@dataclass
class Cluster(Api):
    """The application on Ray Serve, of replicas of the demo checkpoint."""

    ray: LocalCluster

    def ended(self) -> dict[str, float]:
        """Requests by how they ended, as the present HTTP process counts them."""
        name = "krea2_requests_total{outcome="
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]
        counts = {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}
        return {outcome: count for outcome, count in counts.items() if count}


@pytest.fixture(scope="session")
def cluster(demo_model: Path) -> Iterator[Cluster]:
    with LocalCluster(demo_model) as ray:
        yield Cluster(ray.url, ray)
