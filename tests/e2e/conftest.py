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


@pytest.fixture(scope="session")
def cluster(demo_model: Path) -> Iterator[Cluster]:
    with LocalCluster(demo_model) as ray:
        yield Cluster(ray.url, ray)
