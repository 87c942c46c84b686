"""The step scheduler: which unit of work comes next."""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from operator import attrgetter

from krea2_srt.engine.budget import TokenBudget
from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import CostModel
from krea2_srt.engine.lifecycle import Request, Sequence, State
from krea2_srt.engine.pack_builder import PackBuilder
from krea2_srt.engine.work import Decode, Encode, PackStep, Work

MAX_ENCODED_TOGETHER = 8
"""Requests whose prompts are encoded in one go."""

_by_key = attrgetter("key")


class StepScheduler:
    """Orders requests by their key and turns the most urgent one into work.

    Requests wait in a heap until their turn comes for the first time (their prompts are then
    encoded), and are active from there on. A step that would exceed the time of a turn is paused
    between its slices, and any other work may run in between.

    Args:
        config: limits.
        cost: estimates of time.
        overlaps_decodes: decodes run beside the steps, so they are no work of their own.
        full_schedule_graphs: a lone sequence does all its steps in one turn, where they fit.
        adapters_fit: see `Executor.adapters_fit`. A request whose adapters find no room waits
            aside, and those behind it that have any wait too, or it might wait for ever; requests
            without adapters pass.
    """

    def __init__(
        self,
        config: EngineConfig,
        cost: CostModel,
        overlaps_decodes: bool = False,
        full_schedule_graphs: bool = False,
        adapters_fit: Callable[[Collection[str]], bool] = lambda digests: True,
    ) -> None:
        self.config = config
        self.cost = cost
        self.overlaps_decodes = overlaps_decodes
        self.full_schedule_graphs = full_schedule_graphs
        self.budget = TokenBudget(config.max_pack_tokens)
        self.active: dict[Request, None] = {}
        self.paused: list[PackStep] = []
        self.isolated_sequences: dict[Sequence, None] = {}
        self._waiting: list[tuple[float, int, Request]] = []
        self._aside: list[tuple[float, int, Request]] = []
        self._adapters_fit = adapters_fit
        self._adapters: Counter[str] = Counter()
        self._arrivals = count()
        self.num_waiting = 0
        self.num_active_sequences = 0
        """Begun and not ended: those of which the device holds latents."""

    def add(self, request: Request) -> None:
        """Take in a request that waits; its key must not change until it is active."""
        heapq.heappush(self._waiting, (request.key, next(self._arrivals), request))
        self.num_waiting += 1

    def reorder(self, cost: CostModel) -> None:
        """Go by other estimates; the keys of the requests have changed."""
        self.cost = cost
        both = self._waiting + self._aside
        self._waiting, self._aside = [(r.key, n, r) for _, n, r in both if not r.ended], []
        heapq.heapify(self._waiting)

    def activate(self, request: Request) -> None:
        """Its prompts are about to be encoded."""
        self.num_waiting -= 1
        self.active[request] = None

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """Their next step is about to run."""
        for sequence in sequences:
            self.num_active_sequences += not sequence.begun
            sequence.begun = True

    def leave(self, sequence: Sequence) -> None:
        """It has ended."""
        self.num_active_sequences -= sequence.begun
        sequence.begun = False
        self.isolated_sequences.pop(sequence, None)

    def remove(self, request: Request) -> list[PackStep]:
        """Forget a request that has ended.

        Returns:
            Paused steps that it took part in, which are thereby void.
        """
        if request in self.active:
            del self.active[request]
            self._adapters.subtract(request.adapters)
            self._call_back()
        else:
            # It stays in the heap until it comes up, or until such requests are half of it.
            self.num_waiting -= 1
            if len(self._waiting) + len(self._aside) > 2 * self.num_waiting + 64:
                self._waiting = [entry for entry in self._waiting if not entry[2].ended]
                heapq.heapify(self._waiting)
                self._aside = [entry for entry in self._aside if not entry[2].ended]
            if request.adapters:
                self._call_back()
        void = [s for s in self.paused if any(q.request is request for q in s.sequences)]
        self.paused = [s for s in self.paused if s not in void]
        return void

    def isolate(self, sequences: Iterable[Sequence]) -> None:
        """A pack of these has failed: each runs its next step alone, before anything else."""
        self.isolated_sequences |= dict.fromkeys(sequences)

    def stepped(self, sequence: Sequence) -> None:
        """It has done a step, and may have company again."""
        self.isolated_sequences.pop(sequence, None)

    def pick(self) -> Work | None:
        """The next unit of work, or None where there is none.

        Requests that it takes from those that wait have to be run.
        """
        order = sorted(filter(self._runnable, self.active), key=_by_key)
        urgent = order[0] if order else None
        return (
            self._isolated_step()
            or self._next_encode(urgent)
            or self._next_decode(urgent)
            or self._next_step(order)
        )

    def _isolated_step(self) -> PackStep | None:
        return next(map(self._step, self.isolated_sequences), None)

    def _next_encode(self, urgent: Request | None) -> Encode | None:
        """The prompts of what waits, where it is more urgent than all that is active."""
        waiting = self._next_waiting()
        if waiting is not None and (urgent is None or waiting.key < urgent.key):
            return self._encode(urgent)
        if urgent is not None and urgent.state is State.ENCODING:
            # A batch of prompts has failed; one by one now.
            return Encode((urgent,))
        return None

    def _next_decode(self, urgent: Request | None) -> Decode | None:
        if urgent is None or self.overlaps_decodes:
            return None
        return next((Decode(s) for s in urgent.sequences if s.state is State.DECODING), None)

    def _next_step(self, order: list[Request]) -> PackStep | Encode | None:
        """A step of the most urgent sequence, in company where that pays; before it, once, the
        prompts of those that would gain by joining.
        """
        if not order:
            return None
        lead = next(s for s in order[0].sequences if s.state is State.DENOISING)
        step = self._step(lead)
        if step in self.paused or step.blocks_per_slice < step.total_blocks:
            return step
        builder = PackBuilder(lead, self.cost, self.config, self.budget.tokens)
        for sequence in self._company(lead, order):
            builder.admit(sequence)
        waiting = self._next_waiting()
        # Once for this lead and step: where prompts prove longer than estimated, and do not join
        # after all, it would wait for the prompts of all requests.
        if (
            waiting is not None
            and lead.joined_before != lead.step
            and builder.admit(waiting.sequences[0])
        ):
            lead.joined_before = lead.step
            return self._encode(order[0], builder)
        alone = len(order) == len(order[0].sequences) == 1 and not self.num_waiting
        steps = lead.image.steps if alone and self._may_run_whole(lead) else 1
        return PackStep(tuple(builder.sequences), self.cost.blocks, self.cost.blocks, steps=steps)

    def _runnable(self, request: Request) -> bool:
        return not self.overlaps_decodes or any(
            sequence.state is not State.DECODING and not sequence.state.ended
            for sequence in request.sequences
        )

    def _next_waiting(self) -> Request | None:
        """The first of those that wait, where there is room for one more."""
        if self.num_active_sequences >= self.config.max_active_sequences:
            return None
        while self._waiting:
            request = self._waiting[0][2]
            if not request.ended and self._has_room(request):
                return request
            entry = heapq.heappop(self._waiting)
            if not request.ended:
                self._aside.append(entry)
        return None

    def _has_room(self, request: Request) -> bool:
        if not request.adapters:
            return True
        return not self._aside and self._adapters_fit(self._adapters.keys() | request.adapters)

    def _call_back(self) -> None:
        """Some that wait aside may have room now."""
        self._adapters = +self._adapters
        for entry in self._aside:
            heapq.heappush(self._waiting, entry)
        self._aside.clear()

    def _encode(self, urgent: Request | None, builder: PackBuilder | None = None) -> Encode:
        """The first of those that wait, and those behind it that would be next anyway.

        Args:
            urgent: the most urgent of those that do not wait.
            builder: a pack that takes the first of them in; others may join it too.
        """
        chosen: list[Request] = []
        tokens = 0
        while (request := self._next_waiting()) is not None:
            tokens += request.text_tokens
            if chosen and (
                len(chosen) == MAX_ENCODED_TOGETHER
                or self.cost.encode(tokens) > self.config.max_turn_ms
                or not (
                    urgent is None
                    or request.key < urgent.key
                    or (builder is not None and builder.admit(request.sequences[0]))
                )
            ):
                break
            heapq.heappop(self._waiting)
            self._adapters.update(request.adapters)
            chosen.append(request)
        return Encode(tuple(chosen))

    def _step(self, lead: Sequence) -> PackStep:
        """The step of a sequence without company: paused, in slices, or whole."""
        paused = next((step for step in self.paused if lead in step.sequences), None)
        if paused is not None:
            return paused
        step_ms = self.cost.step(lead.tokens)
        blocks = self.cost.blocks_per_slice(step_ms, self.config.max_turn_ms)
        if blocks < self.cost.blocks and len(self.paused) >= self.config.max_paused_steps:
            return min(self.paused, key=lambda step: step.sequences[0].request.key)
        return PackStep((lead,), self.cost.blocks, blocks)

    def _may_run_whole(self, lead: Sequence) -> bool:
        """Whether nothing is lost where a sequence that is alone does all its steps in one turn."""
        return (
            self.full_schedule_graphs
            and lead.step == 0
            and not lead.wants_previews
            and not lead.image.guidance
            and self.cost.step(lead.tokens) * lead.image.steps <= self.config.max_turn_ms
        )

    def _company(self, lead: Sequence, order: list[Request]) -> Iterator[Sequence]:
        paused = {id(sequence) for step in self.paused for sequence in step.sequences}
        for request in order:
            for sequence in request.sequences:
                if (
                    sequence.state is State.DENOISING
                    and sequence is not lead
                    and id(sequence) not in paused
                ):
                    yield sequence
