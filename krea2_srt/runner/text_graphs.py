"""CUDA graphs of the text encoder, at a few lengths and numbers of prompts."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from krea2_srt.errors import first_line
from krea2_srt.runner.graphs import USES_BEFORE_CAPTURE, Capture, Replay

logger = logging.getLogger(__name__)

MAX_ROWS = 8
MAX_LENGTH = 576
"""Of a graph; the template and the longest prompt are 551 tokens."""

LENGTH_STEP = 32

Key = tuple[int, int]
"""Rows and length."""


class TextGraphs:
    """Runs padded prompts, on graphs where their padded size has come before.

    Args:
        forward: token ids [rows, length] -> states [rows, length, ...].
        device: where the ids go.
        capture: how graphs are captured.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], device: torch.device, capture: Capture
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._ids = torch.zeros(MAX_ROWS * MAX_LENGTH, dtype=torch.int64, device=device)
        self._graphs: dict[Key, tuple[Replay, Tensor]] = {}
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
            return self._forward(padded(ids, rows, length).to(self._ids.device))
        places = self._ids[: key[0] * key[1]].view(key)
        places.copy_(padded(ids, *key))
        graph = self._graphs.get(key) or self._add(key, places)
        if graph is None:
            return self._forward(places)
        replay, states = graph
        replay()
        return states

    @torch.inference_mode()
    def prepare(self, rows: int, length: int) -> bool:
        """Capture the graph for prompts of up to this size now; whether there is one."""
        key = (rows, length)
        if key not in self._graphs and not self._failed:
            self._add(key, self._ids[: rows * length].view(key))
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move."""
        self._graphs.clear()

    def _worth_it(self, key: Key) -> bool:
        if self._failed or key[0] > MAX_ROWS or key[1] > MAX_LENGTH:
            return False
        self._uses[key] = self._uses.get(key, 0) + 1
        return key in self._graphs or self._uses[key] >= USES_BEFORE_CAPTURE

    def _add(self, key: Key, places: Tensor) -> tuple[Replay, Tensor] | None:
        found: list[Tensor] = []

        def forward() -> None:
            found[:] = [self._forward(places)]

        try:
            replay = self._capture(forward)
        except Exception as error:
            # The model is transformers' own: what one size cannot do, none can.
            self._failed = True
            logger.warning("krea2-srt: no CUDA graphs of the text encoder: %s", first_line(error))
            return None
        self._graphs[key] = replay, found[0]
        return self._graphs[key]


def padded(ids: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    """int64 [rows, length] on the host: prompts padded on the right, and rows of padding."""
    found = torch.zeros(rows, length, dtype=torch.int64)
    for row, some in enumerate(ids):
        found[row, : len(some)] = torch.tensor(some)
    return found
