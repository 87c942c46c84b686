"""Prompt to selected hidden states: Qwen3-VL, text only, cut after the last selected layer."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.offload import offload
from krea2_srt.model.stored.tensor import shapes_of
from krea2_srt.model.text_encoder_files import (
    StoredTextEncoder,
    may_be_there,
    open_text_encoder,
    text_config,
)
from krea2_srt.model.weights import WeightSlot, check_weights, load_weights
from krea2_srt.request import MAX_TEXT_TOKENS, SUFFIX_TOKENS

logger = logging.getLogger(__name__)

# The template, and how much of it is cut away, as the released pipeline has it.
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34

MAX_ENCODED_TOKENS = PREFIX_TOKENS + MAX_TEXT_TOKENS
"""Tokens of a prompt with its template, at most."""

DEFAULT_SELECT_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)


class TextEncoder:
    """Selected hidden states of prompts.

    Args:
        model: a ``Qwen3VLTextModel`` with just the layers that are needed and no final norm.
        tokenizer: the checkpoint's tokenizer.
        select_layers: indices into the encoder's hidden states; 0 is the embedding output.
        device: where it runs.
        resident: whether its weights are there all the time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        select_layers: Sequence[int],
        device: torch.device,
        resident: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.select_layers = tuple(select_layers)
        self.device = device
        self.resident = resident
        self._suffix_ids = self._ids(SUFFIX)
        if len(self._ids(PREFIX)) != PREFIX_TOKENS or len(self._suffix_ids) != SUFFIX_TOKENS:
            raise CheckpointError(
                f"tokenizer splits the prompt template into {len(self._ids(PREFIX))} + "
                f"{len(self._suffix_ids)} tokens, Krea 2 needs {PREFIX_TOKENS} + {SUFFIX_TOKENS}: "
                "not the Qwen tokenizer?"
            )

    def tokenize(self, prompt: str) -> tuple[list[int], bool]:
        """Token ids of template and prompt, and whether the prompt had to be cut."""
        ids = self._ids(PREFIX + prompt)
        limit = MAX_ENCODED_TOKENS - SUFFIX_TOKENS
        return ids[:limit] + self._suffix_ids, len(ids) > limit

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Selected hidden states of each prompt, suffix included, template prefix dropped.

        Returns:
            One [tokens, layers, hidden] per prompt. A prompt's states do not depend on the others:
            prompts are padded on the right, which causal attention never looks at, and
            positions count real tokens only.
        """
        ids = [self.tokenize(prompt)[0] for prompt in prompts]
        states = self.states(to_device(padded(ids, len(ids), max(map(len, ids))), self.device))
        return [states[row, PREFIX_TOKENS : len(x)] for row, x in enumerate(ids)]

    def states(self, ids: Tensor) -> Tensor:
        """Token ids [rows, length] -> selected hidden states [rows, length, layers, hidden]."""
        states = self.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack([states[i] for i in self.select_layers], dim=2)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def text_model(
    path: Path, select_layers: Sequence[int], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """The part of a checkpoint's text model that is needed, without memory for its weights.

    Args:
        path: see `load_text_encoder`; no weights are read.
        select_layers: hidden states that are read.
        dtype: of the weights.

    Returns:
        The model on the meta device, and its rotary embedding on the host.

    Raises:
        CheckpointError: see `load_text_encoder`.
    """
    return _text_model(path, text_config(path), select_layers, dtype)


def _text_model(
    path: Path, config: dict[str, Any], select_layers: Sequence[int], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    layers, needed = config.get("num_hidden_layers"), max(select_layers)
    # The state after the last layer is normed, unlike all before it; no Krea 2 reads it.
    if not isinstance(layers, int) or layers <= needed:
        raise CheckpointError(
            f"{path}: has {layers} layers, text_encoder_select_layers needs more than {needed}"
        )
    try:
        return empty_text_model(config, needed, dtype)
    except ImportError:  # no fault of the checkpoint
        raise
    except Exception as error:  # whatever transformers makes of a strange config
        raise CheckpointError(f"{path}: its config is not valid: {first_line(error)}") from None


def padded(ids: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    """int64 [rows, length] on the host: prompts padded on the right, and rows of padding."""
    found = torch.zeros(rows, length, dtype=torch.int64)
    for row, some in enumerate(ids):
        found[row, : len(some)] = torch.tensor(some)
    return found


def kept_tokens(ids: Sequence[Sequence[int]], length: int) -> list[int]:
    """Places of the prompts' tokens without the template's prefix in flat ids [rows * length]."""
    return [
        row * length + place
        for row, some in enumerate(ids)
        for place in range(PREFIX_TOKENS, len(some))
    ]


_ATTENTION = "krea2_causal"
"""As transformers knows `_causal_attention`."""


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' own, always causal and without a mask.

    Transformers builds no mask for an attention that it has no mask function for. For its ``sdpa``
    it reads on the host whether one is needed, and builds one in any case while a CUDA graph is
    captured: what is captured is then not what was warmed up.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options |= {"is_causal": True}
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return found


def empty_text_model(
    text_config: dict[str, Any], layers: int, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """A ``Qwen3VLTextModel`` of some layers, without memory for its weights.

    Args:
        text_config: as transformers names its sizes.
        layers: to the last selected one. Those beyond it are never read, so never loaded.
        dtype: of the weights.

    Returns:
        See `text_model`.
    """
    from transformers import AttentionInterface, Qwen3VLTextConfig, Qwen3VLTextModel

    AttentionInterface.register(_ATTENTION, _causal_attention)
    values = {**text_config, "num_hidden_layers": layers}
    if isinstance(values.get("layer_types"), list):
        values["layer_types"] = values["layer_types"][:layers]
    config = Qwen3VLTextConfig(**values)
    config._attn_implementation = _ATTENTION
    with torch.device("meta"):
        model = Qwen3VLTextModel(config).to(dtype)
    rotary = type(model.rotary_emb)(config=config)
    # The last selected state is the plain output of its layer.
    model.norm = nn.Identity()
    return model, rotary


def load_text_encoder(
    path: Path,
    tokenizer_folder: Path,
    select_layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    resident: bool = True,
) -> TextEncoder:
    """Load the part of a Qwen3-VL checkpoint that these layers need.

    Args:
        path: a Qwen3-VL checkpoint: a folder with its ``config.json`` and ``model*.safetensors``,
            or a single file.
        tokenizer_folder: the tokenizer's files.
        select_layers: hidden states to return.
        device: where it runs.
        dtype: of the weights.
        resident: whether the weights stay on the device; otherwise those of each layer come there
            when it runs.

    Raises:
        CheckpointError: missing or damaged files, another architecture, too few layers.
    """
    from transformers import AutoTokenizer

    with open_text_encoder(path) as stored:
        model, rotary = _checked_model(path, stored, select_layers, dtype)
        model = model.to_empty(device=device if resident else "cpu")
        # to_empty leaves the rotary frequencies, which no checkpoint stores, undefined.
        model.rotary_emb = rotary.to(device)
        loaded = load_weights(stored.tensors, _weight_map(model))
    if (line := loaded.line(path, stored.notes)) is not None:
        logger.info("%s", line)
    model.requires_grad_(False).eval()
    if not resident:
        offload(text_model_units(model), device)

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        return TextEncoder(model, tokenizer, select_layers, device, resident)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers makes of strange files
        reason = first_line(error)
        raise CheckpointError(f"tokenizer in {tokenizer_folder} cannot be read: {reason}") from None


def check_text_encoder(path: Path, select_layers: Sequence[int]) -> None:
    """Check all that can be told of a text encoder without reading its weights.

    Args:
        path, select_layers: see `load_text_encoder`.

    Raises:
        CheckpointError: see `load_text_encoder`.
    """
    with open_text_encoder(path) as stored:
        _checked_model(path, stored, select_layers, torch.bfloat16)


def _checked_model(
    path: Path, stored: StoredTextEncoder, select_layers: Sequence[int], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """See `text_model`; all of its tensors are there."""
    model, rotary = _text_model(path, stored.config, select_layers, dtype)
    needed, layers = _weight_map(model), len(text_model_units(model)) - 1
    check_weights(
        needed,
        shapes_of(stored.tensors),
        path,
        ignore=lambda name: may_be_there(name, needed, layers),
    )
    return model, rotary


def text_model_units(model: nn.Module) -> list[nn.Module]:
    """Its pieces that hold weights, one of which runs at a time."""
    layers: Any = model.layers
    return [model.embed_tokens, *layers]


def _weight_map(model: nn.Module) -> dict[str, WeightSlot]:
    return {name: WeightSlot(p.data) for name, p in model.named_parameters()}
