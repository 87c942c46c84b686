"""CUDA graphs of the text encoder, at a few lengths and numbers of prompts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krea2_srt.model.host_copies import copy_to, to_device
from krea2_srt.runner.graph_record import Eager, GraphRecord
from krea2_srt.runner.graphs import Capture, Replay

MAX_ROWS = 4
"""Of a graph; more prompts keep the device busy for longer than they take to launch."""

MAX_LENGTH = 576
"""Of a graph; the template and the longest prompt are 551 tokens."""

LENGTH_STEP = 32


class TextKey(NamedTuple):
    """What a graph is captured for: prompts, and tokens of each with its template."""

    rows: int
    length: int

    def __str__(self) -> str:
        return f"up to {self.rows} prompts of up to {self.length} tokens"


class TextGraphs:
    """Runs padded prompts, on graphs where their padded size has come before: a capture takes as
    long as some prompts.

    Args:
        forward: token ids [rows, length] -> states [rows, length, ...].
        state: one token's states, for their shape, dtype and device.
        capture: how graphs are captured.

    Attributes:
        record: what they have done.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], state: Tensor, capture: Capture
    ) -> None:
        self._forward = forward
        self._capture = capture
        count = MAX_ROWS * MAX_LENGTH
        # Shared by all graphs: each result of its own would take gigabytes.
        self._ids = torch.zeros(count, dtype=torch.int64, device=state.device)
        self._states = state.new_zeros(count, *state.shape)
        self._graphs: dict[TextKey, Replay] = {}
        self._seen: set[TextKey] = set()
        self.record = GraphRecord("text encoder")

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def failures(self) -> dict[str, str]:
        """Sizes that were to be captured and could not, in words, and why."""
        return self.record.failures

    def __call__(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """States of prompts.

        Args:
            ids: of each prompt.

        Returns:
            [at least len(ids), at least the longest, ...]; overwritten by the next call.
        """
        rows, length = len(ids), max(map(len, ids))
        key = TextKey(1 << (rows - 1).bit_length(), -(-length // LENGTH_STEP) * LENGTH_STEP)
        why = self._why_eager(key)
        if why is not None:
            self.record.eager[why] += 1
            return self._forward(to_device(padded(ids, rows, length), self._ids.device))
        places, states = self._places(key)
        copy_to(places, padded(ids, *key))
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            self.record.eager[Eager.FAILED] += 1
            return self._forward(places)
        replay()
        self.record.replayed += 1
        return states

    @torch.inference_mode()
    def prepare(self, rows: int, length: int) -> bool:
        """Capture the graph for prompts of up to this size now; whether there is one."""
        key = TextKey(rows, length)
        if key not in self._graphs and str(key) not in self.failures:
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move."""
        self._graphs.clear()
        self.record.memory_freed()

    def _why_eager(self, key: TextKey) -> Eager | None:
        """Why not to replay or capture; notes what has come."""
        if key.rows > MAX_ROWS or key.length > MAX_LENGTH:
            return Eager.TOO_LARGE
        seen = key in self._seen
        self._seen.add(key)
        if key in self._graphs:
            return None
        if str(key) in self.failures:
            return Eager.FAILED
        return None if seen else Eager.FIRST_USE

    def _places(self, key: TextKey) -> tuple[Tensor, Tensor]:
        """Ids and states of padded prompts of a size."""
        count = key[0] * key[1]
        return self._ids[:count].view(key), self._states[:count].unflatten(0, key)

    def _add(self, key: TextKey) -> Replay | None:
        places, states = self._places(key)
        try:
            replay = self._capture(lambda: states.copy_(self._forward(places)))
        except Exception as error:
            # Prompts of this size are encoded without; others may still be captured.
            self.record.failed(str(key), error)
            return None
        self._graphs[key] = replay
        return replay


def padded(ids: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    """int64 [rows, length] on the host: prompts padded on the right, and rows of padding."""
    found = torch.zeros(rows, length, dtype=torch.int64)
    for row, some in enumerate(ids):
        found[row, : len(some)] = torch.tensor(some)
    return found
