"""Where a request goes: to the replica where it adds least to what all wait."""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from krea2_server.ray.fleet import fleet_of_this_process
from krea2_srt.messages import GenerateRequest
from krea2_srt.routing import image_ms


class WorkRouter(RequestRouter):
    """Ray Serve's router, by the work that requests are estimated to be.

    Ray's own goes by how many requests a replica has, and a 2048x2048 image is 60 times the work of
    a 256x256 one.
    """

    def initialize_state(self) -> None:
        self._fleet = fleet_of_this_process()
        self._unrouted: dict[str, PendingRequest] = {}
        self._names: dict[str, str] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self._fleet.update(
            {r.replica_id: {**r.replica_metadata, **r.routing_stats} for r in replicas}
        )
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._fleet.drop(replica_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All of them, a rank each: one that has no room is passed over."""
        message = None if pending_request is None else _message(pending_request)
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        ranking = self.ranking(message, list(by_id))
        if pending_request is not None and ranking:
            # Else all ranks would be tried again without a pause while none has room.
            pending_request.routing_context.should_backoff = True
            # Counted already: the next may be chosen for before this one is on its way.
            self._forget_cancelled()
            self._unrouted[pending_request.metadata.internal_request_id] = pending_request
            self._place(pending_request, ranking[0])
        return [[by_id[replica_id]] for replica_id in ranking]

    def ranking(
        self, message: GenerateRequest | None, candidates: Sequence[ReplicaID]
    ) -> Sequence[ReplicaID]:
        """The candidates for a request, or for anything else, the best first."""
        if message is None:
            return self._fleet.ranking(1, candidates)
        return self._fleet.ranking(_work(message), candidates, message.adapters)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._unrouted.pop(pending_request.metadata.internal_request_id, None)
        self._place(pending_request, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._remove(internal_request_id, replica_id)

    def _place(self, request: PendingRequest, replica_id: ReplicaID) -> None:
        internal_id = request.metadata.internal_request_id
        message = _message(request)
        name = internal_id if message is None else message.request_id
        self._names[internal_id] = name
        self._fleet.place(name, replica_id, 1 if message is None else _work(message))

    def _remove(self, internal_id: str, replica_id: ReplicaID | None = None) -> None:
        name = self._names.get(internal_id)
        if name is None:
            return
        self._fleet.remove(name, replica_id)
        # A request that is tried again has the same ids, and may be elsewhere by now.
        if name not in self._fleet:
            del self._names[internal_id]

    def _forget_cancelled(self) -> None:
        """Requests that ended before they were routed: nobody tells of those."""
        for internal_id, request in list(self._unrouted.items()):
            if request.future.cancelled():
                del self._unrouted[internal_id]
                self._remove(internal_id)


def _message(request: PendingRequest) -> GenerateRequest | None:
    """What is to be generated; None of a call that generates nothing."""
    message = request.args[0] if request.args else None
    return message if isinstance(message, GenerateRequest) else None


def _work(message: GenerateRequest) -> int:
    """Estimated milliseconds."""
    return image_ms(message.image, message.image.num_images)
