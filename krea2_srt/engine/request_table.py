"""The requests in the engine, and how much work each still is."""

from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.policy import Policy


class RequestTable:
    """Keeps what is derived from the progress of requests: remaining work, keys, and the sum.

    Attributes:
        requests: by id.
        outstanding_ms: estimated work of all of them.
    """

    def __init__(self, cost: CostModel, policy: Policy) -> None:
        self.requests: dict[str, Request] = {}
        self.outstanding_ms = 0.0
        self._cost = cost
        self._policy = policy

    def estimate(self, request: Request) -> None:
        """Set a request's remaining work and key."""
        request.remaining_ms = self._remaining_ms(request)
        request.key = self._policy(request)

    def add(self, request: Request) -> None:
        """Take in a request that has been estimated."""
        self.requests[request.id] = request
        self.outstanding_ms += request.remaining_ms

    def update(self, request: Request) -> None:
        """A request has made progress."""
        before = request.remaining_ms
        self.estimate(request)
        self.outstanding_ms += request.remaining_ms - before

    def remove(self, request: Request) -> None:
        """A request has ended."""
        del self.requests[request.id]
        self.outstanding_ms -= request.remaining_ms
        request.remaining_ms = 0.0
        if not self.requests:
            self.outstanding_ms = 0.0  # where rounding errors would add up

    def reprice(self, cost: CostModel) -> None:
        """Estimate all requests anew."""
        self._cost = cost
        for request in self.requests.values():
            self.update(request)

    def _remaining_ms(self, request: Request) -> float:
        """Estimated work of a request, alone."""
        total = 0.0
        if request.state in (State.WAITING, State.ENCODING):
            total += self._cost.encode(request.text_tokens)
        for sequence in request.sequences:
            if not sequence.state.ended:
                image = sequence.image
                if steps := image.steps - sequence.step:
                    total += steps * self._cost.step(sequence.tokens)
                total += self._cost.decode(image.width * image.height)
        return total
