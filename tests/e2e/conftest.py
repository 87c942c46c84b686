"""A Ray cluster of this machine, with the application on it, once for all slow tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from krea2_bench.ray_serve.cluster import LocalCluster
from tests.server.serving import Api

FLOAT32 = "--dit-precision fp32 --vae-precision fp32 --text-encoder-precisions fp32"
"""On CPUs without bfloat16 instructions a picture takes minutes in it."""


@dataclass
class Cluster(Api):
    """The application on Ray Serve, of replicas of the demo checkpoint."""

    ray: LocalCluster


@pytest.fixture(scope="session")
def cluster(demo_model: Path) -> Iterator[Cluster]:
    with LocalCluster(demo_model, FLOAT32) as ray:
        yield Cluster(ray.url, ray)
