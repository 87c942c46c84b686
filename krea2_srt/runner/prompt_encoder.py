"""From prompts to the context tokens that the DiT reads."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from krea2_srt.model.deltas import Deltas
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.pack import Segments
from krea2_srt.model.text_encoder import PREFIX_TOKENS, TextEncoder, kept_tokens, padded
from krea2_srt.runner.attention import AttentionChoice
from krea2_srt.runner.graphs import Capture, Eager, TextGraphs

# Not cuDNN's, which builds a plan for each length of a prompt: tens to hundreds of milliseconds, in
# which nothing else is launched, and not possible while a graph is captured.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PromptEncoder:
    """The text encoder and the DiT's text fusion, which make one program, eager or replayed.

    Args:
        text_encoder: with its tokenizer.
        dit: for its text fusion.
        attention: of which fusion takes the one for graphs, if there is one: eagerly too.

    Attributes:
        graphs: replay what they can; None runs all eagerly.
        prompts_at_once: that are encoded together, at most; None is all.
    """

    def __init__(
        self, text_encoder: TextEncoder, dit: Krea2DiT, attention: AttentionChoice
    ) -> None:
        self._text_encoder = text_encoder
        self._dit = dit
        backend = attention.graph or attention.eager
        self._attend = backend.prompts or backend.attend
        self._capturable = backend.capturable
        self.graphs: TextGraphs | None = None
        self.prompts_at_once: int | None = None

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], deltas: Deltas | None = None) -> list[Tensor]:
        """Fused context [text tokens, hidden] of each prompt; it does not depend on the others.

        Args:
            prompts: at least one.
            deltas: of the fusion's matrices, the same for all; with them nothing is replayed.
        """
        some = self.prompts_at_once or len(prompts)
        return [
            context
            for start in range(0, len(prompts), some)
            for context in self._encode(prompts[start : start + some], deltas)
        ]

    def _encode(self, prompts: Sequence[str], deltas: Deltas | None) -> list[Tensor]:
        ids = [self._text_encoder.tokenize(prompt)[0] for prompt in prompts]
        if deltas is not None:
            if self.graphs is not None:
                self.graphs.record.eager[Eager.ADAPTERS] += 1
            return self._encode_eagerly(ids, deltas)
        found = self.graphs.encode(ids) if self.graphs is not None else None
        return self._encode_eagerly(ids) if found is None else found

    def use_graphs(self, capture: Capture) -> None:
        """Replay what can be replayed from now on; the weights must stay where they are."""
        assert self._capturable
        self.graphs = TextGraphs(
            self.forward,
            self._dit.config.hidden_size,
            self._dit.dtype,
            self._text_encoder.device,
            capture,
        )

    def forward(
        self, ids: Tensor, kept: Tensor, prompts: Segments, deltas: Deltas | None = None
    ) -> Tensor:
        """What is run on the device.

        Args:
            ids: [rows, length] tokens of the prompts with their templates, padded on the right.
            kept: int64 [T], which of these rows * length tokens become context, one prompt's after
                another's.
            prompts: which of the T are one prompt's.
            deltas: see `encode`.

        Returns:
            [T, hidden].
        """
        with sdpa_kernel(_KERNELS):
            states = self._text_encoder.states(ids).flatten(0, 1).index_select(0, kept)
            return self._dit.fuse_text(states, prompts, self._attend, deltas)

    def _encode_eagerly(self, ids: list[list[int]], deltas: Deltas | None = None) -> list[Tensor]:
        length, device = max(map(len, ids)), self._text_encoder.device
        prompts = Segments.of((len(some) - PREFIX_TOKENS for some in ids), device)
        contexts = self.forward(
            to_device(padded(ids, len(ids), length), device),
            to_device(torch.tensor(kept_tokens(ids, length)), device),
            replace(prompts, spans=()) if self._capturable else prompts,
            deltas,
        )
        # Clones, so that a remembered prompt does not keep its whole batch alive.
        return [contexts[start:end].clone() for start, end in prompts.spans]
