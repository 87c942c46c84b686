"""CUDA graphs of the text encoder, at a few lengths and numbers of prompts."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.model.host_copies import copy_to, to_device
from krea2_srt.runner.graphs import USES_BEFORE_CAPTURE, Capture, Replay

logger = logging.getLogger(__name__)

MAX_ROWS = 4
"""Of a graph; more prompts keep the device busy for longer than they take to launch."""

MAX_LENGTH = 576
"""Of a graph; the template and the longest prompt are 551 tokens."""

LENGTH_STEP = 32

Key = tuple[int, int]
"""Rows and length."""


class TextGraphs:
    """Runs padded prompts, on graphs where their padded size has come before.

    Args:
        forward: token ids [rows, length] -> states [rows, length, ...].
        state: one token's states, for their shape, dtype and device.
        capture: how graphs are captured.
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
        self._graphs: dict[Key, Replay] = {}
        self._uses: dict[Key, int] = {}
        self._failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """States of prompts.

        Args:
            ids: of each prompt.

        Returns:
            [at least len(ids), at least the longest, ...]; overwritten by the next call.
        """
        rows, length = len(ids), max(map(len, ids))
        key = (1 << (rows - 1).bit_length(), -(-length // LENGTH_STEP) * LENGTH_STEP)
        if not self._worth_it(key):
            return self._forward(to_device(padded(ids, rows, length), self._ids.device))
        places, states = self._places(key)
        copy_to(places, padded(ids, *key))
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            return self._forward(places)
        replay()
        return states

    @torch.inference_mode()
    def prepare(self, rows: int, length: int) -> bool:
        """Capture the graph for prompts of up to this size now; whether there is one."""
        key = (rows, length)
        if key not in self._graphs and not self._failed:
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move."""
        self._graphs.clear()

    def _worth_it(self, key: Key) -> bool:
        if self._failed or key[0] > MAX_ROWS or key[1] > MAX_LENGTH:
            return False
        self._uses[key] = self._uses.get(key, 0) + 1
        return key in self._graphs or self._uses[key] >= USES_BEFORE_CAPTURE

    def _places(self, key: Key) -> tuple[Tensor, Tensor]:
        """Ids and states of padded prompts of a size."""
        count = key[0] * key[1]
        return self._ids[:count].view(key), self._states[:count].unflatten(0, key)

    def _add(self, key: Key) -> Replay | None:
        places, states = self._places(key)
        try:
            replay = self._capture(lambda: states.copy_(self._forward(places)))
        except Exception as error:
            # The model is transformers' own: what one size cannot do, none can.
            self._failed = True
            logger.warning("krea2-srt: no CUDA graphs of the text encoder: %s", first_line(error))
            return None
        self._graphs[key] = replay
        return replay


def padded(ids: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    """int64 [rows, length] on the host: prompts padded on the right, and rows of padding."""
    found = torch.zeros(rows, length, dtype=torch.int64)
    for row, some in enumerate(ids):
        found[row, : len(some)] = torch.tensor(some)
    return found
