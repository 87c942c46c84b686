"""The routers that are compared; a module of its own, as Ray imports it in its replicas too."""

from collections.abc import Sequence
from itertools import count

from ray.serve.request_router import ReplicaID, RequestRouter

from krea2_server.ray.router import WorkRouter
from krea2_srt.messages import GenerateRequest


class RoundRobinRouter(WorkRouter):
    """Each request to the next replica: what ours is measured against."""

    def initialize_state(self) -> None:
        super().initialize_state()
        self._turns = count()

    def ranking(
        self, message: GenerateRequest | None, candidates: Sequence[ReplicaID]
    ) -> Sequence[ReplicaID]:
        first = next(self._turns) % max(len(candidates), 1)
        return [*candidates[first:], *candidates[:first]]


ROUTERS: dict[str, type[RequestRouter]] = {"work": WorkRouter, "round_robin": RoundRobinRouter}
