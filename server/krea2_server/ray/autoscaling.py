"""How many replicas: as many as finish what is outstanding in time."""

from typing import Any

from ray.serve.config import AutoscalingContext

METRIC = "outstanding_s"


class QueueSeconds:
    """An autoscaling policy of Ray Serve: seconds of estimated work for each replica.

    Not the number of requests, which says little: one may be 60 times the work of another. Bounds
    and delays are Ray Serve's own, `min_replicas`, `upscale_delay_s` and so on.

    Args:
        target_s: of work that a replica should have before it.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        outstanding = (context.aggregated_metrics or {}).get(METRIC, {})
        return max(sum(outstanding.values()) / self._target_s, 1.0), {}
