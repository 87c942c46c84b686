"""CUDA graphs from token ids to contexts, at a few lengths and numbers of prompts."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from krea2_srt.model.host_copies import copy_to
from krea2_srt.model.pack import Segments
from krea2_srt.model.text_encoder import PREFIX_TOKENS, kept_tokens, padded
from krea2_srt.runner.capture import Capture, Replay
from krea2_srt.runner.graph_record import Eager, GraphRecord

MAX_ROWS = 4
"""Most prompts of a graph; more keep the device busy for longer than they take to launch."""

MAX_LENGTH = 576
"""Most tokens of a prompt in a graph; the template and the longest prompt are 551."""

LENGTH_STEP = 32

MAX_KEPT = MAX_ROWS * (MAX_LENGTH - PREFIX_TOKENS)
"""Context tokens of the largest graph."""

Forward = Callable[[Tensor, Tensor, Segments], Tensor]


class TextKey(NamedTuple):
    """What a graph is captured for: prompts, and tokens of each with its template."""

    rows: int
    length: int

    def __str__(self) -> str:
        return f"up to {self.rows} prompts of up to {self.length} tokens"

    @property
    def longest(self) -> int:
        """Context tokens of a prompt, at most."""
        return self.length - PREFIX_TOKENS

    @property
    def kept(self) -> int:
        """Context tokens of all prompts, with padding."""
        return self.rows * self.longest


class TextGraphs:
    """Encodes prompts on graphs where their padded size has come before: a capture takes as long
    as some prompts.

    Args:
        forward: see `PromptEncoder.forward`; must read ``cu_seqlens`` of the segments alone.
        width: of a context.
        dtype: of a context.
        device: where all run.
        capture: how graphs are captured.

    Attributes:
        record: what they have done.
    """

    def __init__(
        self,
        forward: Forward,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._forward = forward
        self._capture = capture
        # Shared by all graphs.
        self._ids = torch.zeros(MAX_ROWS * MAX_LENGTH, dtype=torch.int64, device=device)
        self._kept = torch.zeros(MAX_KEPT, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(2 * MAX_ROWS + 1, dtype=torch.int32, device=device)
        self._contexts = torch.zeros(MAX_KEPT, width, dtype=dtype, device=device)
        self._graphs: dict[TextKey, Replay] = {}
        self._seen: set[TextKey] = set()
        self.record = GraphRecord("text encoder")

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def failures(self) -> dict[str, str]:
        """Sizes that were to be captured and could not, in words, and why."""
        return self.record.failures

    def encode(self, ids: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Encode prompts, if there is a graph for them or it is time to capture one.

        Args:
            ids: of each prompt with its template.

        Returns:
            The context of each; None if no graph serves.
        """
        rows, length = len(ids), max(map(len, ids))
        key = TextKey(1 << (rows - 1).bit_length(), -(-length // LENGTH_STEP) * LENGTH_STEP)
        why = self._why_eager(key)
        if why is not None:
            self.record.eager[why] += 1
            return None
        self._load(key, ids)
        replay = self._graphs.get(key) or self._add(key)
        if replay is None:
            self.record.eager[Eager.FAILED] += 1
            return None
        replay()
        self.record.replayed += 1
        ends = [0, *accumulate(len(some) - PREFIX_TOKENS for some in ids)]
        return [self._contexts[start:end].clone() for start, end in pairwise(ends)]

    @torch.inference_mode()
    def prepare(self, rows: int, length: int) -> bool:
        """Capture the graph for prompts of up to this size now; whether there is one."""
        key = TextKey(rows, length)
        if key not in self._graphs and str(key) not in self.failures:
            self._load(key, [[0] * length] * rows)
            self._add(key)
        return key in self._graphs

    def release(self) -> None:
        """Forget all graphs: the weights are about to move."""
        self._graphs.clear()
        self.record.memory_freed()

    def forward(self, key: TextKey) -> None:
        """What a graph does, on what lies in the buffers."""
        ids = self._ids[: key.rows * key.length].view(key)
        prompts = Segments(self._cu_seqlens[: 2 * key.rows + 1], (), key.longest)
        contexts = self._forward(ids, self._kept[: key.kept], prompts)
        self._contexts[: key.kept].copy_(contexts)

    def _load(self, key: TextKey, ids: Sequence[Sequence[int]]) -> None:
        """Copy prompts in, padded to the key's size."""
        kept = kept_tokens(ids, key.length)
        padding = key.kept - len(kept)
        # Padding is any token, again and again, in segments that are no longer than prompts may be.
        # Of these, the key has room for as many as it has prompts; the rest are empty.
        lengths = [len(some) - PREFIX_TOKENS for some in ids]
        while padding > 0:
            lengths.append(min(padding, key.longest))
            padding -= lengths[-1]
        lengths += [0] * (2 * key.rows - len(lengths))
        copy_to(self._ids[: key.rows * key.length].view(key), padded(ids, *key))
        kept += [0] * (key.kept - len(kept))
        copy_to(self._kept[: key.kept], torch.tensor(kept))
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        copy_to(self._cu_seqlens[: 2 * key.rows + 1], offsets)

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

    def _add(self, key: TextKey) -> Replay | None:
        try:
            replay = self._capture(lambda: self.forward(key))
        except Exception as error:
            # Prompts of this size are encoded without; others may still be captured.
            self.record.failed(str(key), error)
            return None
        self._graphs[key] = replay
        return replay
