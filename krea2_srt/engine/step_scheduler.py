"""The step scheduler: which unit of work comes next."""

import heapq
from collections.abc import Iterator
from itertools import count
from operator import attrgetter

from krea2_srt.engine.budget import TokenBudget
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import Request, Sequence, State
from krea2_srt.engine.work import Decode, Encode, PackStep, Work

MIN_GAIN = 0.1
"""A sequence joins a pack only if that takes this much less time than its step alone. Beyond what
fills the device, sharing a forward makes every image in it later and none earlier."""

MAX_ENCODED_TOGETHER = 8
"""Requests whose prompts are encoded in one go."""

_by_key = attrgetter("key")


class StepScheduler:
    """Orders requests by their key and turns the most urgent one into work.

    Requests wait in a heap until their turn comes for the first time (their prompts are then
    encoded), and are active from there on. A step that would exceed the time of a turn is held
    between its slices, and any other work may run in between.

    Args:
        config: limits.
        cost: estimates of time.
        decodes_aside: decodes run beside the steps, so they are no work of their own.
    """

    def __init__(self, config: EngineConfig, cost: CostModel, decodes_aside: bool = False) -> None:
        self.config = config
        self.cost = cost
        self.decodes_aside = decodes_aside
        self.budget = TokenBudget(config.max_pack_tokens)
        self.active: dict[Request, None] = {}
        self.held: list[PackStep] = []
        self._waiting: list[tuple[float, int, Request]] = []
        self._arrivals = count()
        self.num_waiting = 0
        self.num_active_sequences = 0

    def add(self, request: Request) -> None:
        """Take in a request that waits; its key must not change until it is active."""
        heapq.heappush(self._waiting, (request.key, next(self._arrivals), request))
        self.num_waiting += 1

    def reorder(self, cost: CostModel) -> None:
        """Go by other estimates; the keys of the requests have changed."""
        self.cost = cost
        self._waiting = [(r.key, n, r) for _, n, r in self._waiting if not r.ended]
        heapq.heapify(self._waiting)

    def activate(self, request: Request) -> None:
        """Its prompts are about to be encoded."""
        self.num_waiting -= 1
        self.active[request] = None
        self.num_active_sequences += len(request.sequences)

    def remove(self, request: Request) -> list[PackStep]:
        """Forget a request that has ended.

        Returns:
            Held steps that it took part in, which are thereby void.
        """
        if request in self.active:
            del self.active[request]
            self.num_active_sequences -= len(request.sequences)
        else:
            # It stays in the heap until it comes up, or until such requests are half of it.
            self.num_waiting -= 1
            if len(self._waiting) > 2 * self.num_waiting + 64:
                self._waiting = [entry for entry in self._waiting if not entry[2].ended]
                heapq.heapify(self._waiting)
        void = [s for s in self.held if any(q.request is request for q in s.sequences)]
        self.held = [s for s in self.held if s not in void]
        return void

    def pick(self) -> Work | None:
        """The next unit of work, or None where there is none."""
        order = sorted(self.active, key=_by_key)
        waiting = self._next_waiting()
        if waiting is not None and self._has_room(waiting):
            runnable = next((r for r in order if self._runnable(r)), None)
            if runnable is None or waiting.key < runnable.key:
                return self._encode(runnable)
        for request in order:
            # A batch of prompts failed to encode; one by one now.
            if request.state is State.ENCODING:
                return Encode((request,))
            if not self.decodes_aside:
                for sequence in request.sequences:
                    if sequence.state is State.DECODING:
                        return Decode(sequence)
            for sequence in request.sequences:
                if sequence.state is State.DENOISING:
                    return self._step(sequence, order)
        return None

    def _runnable(self, request: Request) -> bool:
        return not self.decodes_aside or any(
            sequence.state is not State.DECODING and not sequence.state.ended
            for sequence in request.sequences
        )

    def _next_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][2].ended:
            heapq.heappop(self._waiting)
        return self._waiting[0][2] if self._waiting else None

    def _has_room(self, request: Request) -> bool:
        room = self.config.max_active_sequences - self.num_active_sequences
        return len(request.sequences) <= room or not self.active

    def _encode(self, before: Request | None) -> Encode:
        """The most urgent request, and those behind it that would be next anyway."""
        chosen: list[Request] = []
        sequences, tokens = self.num_active_sequences, 0
        while (request := self._next_waiting()) is not None:
            sequences += len(request.sequences)
            tokens += sum(
                lane - image.image_tokens
                for image, sequence in zip(request.images, request.sequences, strict=True)
                for lane in sequence.tokens
            )
            if chosen and (
                len(chosen) == MAX_ENCODED_TOGETHER
                or sequences > self.config.max_active_sequences
                or self.cost.encode(tokens) > self.config.max_turn_ms
                or (before is not None and request.key >= before.key)
            ):
                break
            heapq.heappop(self._waiting)
            chosen.append(request)
        return Encode(tuple(chosen))

    def _step(self, lead: Sequence, order: list[Request]) -> PackStep:
        held = next((step for step in self.held if lead in step.sequences), None)
        if held is not None:
            return held
        tokens, squares = _sums(lead)
        step_ms = self.cost.forward(tokens, squares)
        blocks = self.cost.blocks_per_slice(step_ms, self.config.max_turn_ms)
        if blocks < self.cost.blocks:
            if len(self.held) >= self.config.max_held_steps:
                return min(self.held, key=lambda step: step.sequences[0].request.key)
            return PackStep((lead,), self.cost.blocks, blocks)
        pack = [lead]
        if not lead.alone:
            for sequence in self._company(lead, order):
                more, more_squares = _sums(sequence)
                if tokens + more > self.budget.tokens:
                    continue
                together = self.cost.forward(tokens + more, squares + more_squares)
                added_ms, alone_ms = together - step_ms, self.cost.forward(more, more_squares)
                if together > self.config.max_turn_ms or added_ms > (1 - MIN_GAIN) * alone_ms:
                    continue
                pack.append(sequence)
                tokens, squares, step_ms = tokens + more, squares + more_squares, together
                if len(pack) == self.config.max_pack_sequences:
                    break
        return PackStep(tuple(pack), self.cost.blocks, self.cost.blocks)

    def _company(self, lead: Sequence, order: list[Request]) -> Iterator[Sequence]:
        held = {id(sequence) for step in self.held for sequence in step.sequences}
        for request in order:
            for sequence in request.sequences:
                if (
                    sequence.state is State.DENOISING
                    and sequence is not lead
                    and not sequence.alone
                    and id(sequence) not in held
                ):
                    yield sequence


def _sums(sequence: Sequence) -> tuple[int, int]:
    return sum(sequence.tokens), sum(lane * lane for lane in sequence.tokens)
