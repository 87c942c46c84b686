"""Prompt to selected hidden states: Qwen3-VL, text only, cut after the last selected layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krea2_srt.errors import CheckpointError, first_line
from krea2_srt.model.host_copies import to_device
from krea2_srt.model.json_files import read_json
from krea2_srt.model.offload import offload
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.tensor import shapes_of
from krea2_srt.model.weights import (
    WeightSlot,
    check_weights,
    checkpoint_files,
    load_weights,
)
from krea2_srt.request import MAX_TEXT_TOKENS, SUFFIX_TOKENS

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
    folder: Path, select_layers: Sequence[int], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """The part of a checkpoint's text model that is needed, without memory for its weights.

    Returns:
        The model on the meta device, and its rotary embedding on the host.

    Raises:
        CheckpointError: see `load_text_encoder`.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "qwen3_vl":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, "
            "expected 'qwen3_vl'"
        )
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: no text_config in it")
    layers, needed = text_config.get("num_hidden_layers"), max(select_layers)
    # The state after the last layer is normed, unlike all before it; no Krea 2 reads it.
    if not isinstance(layers, int) or layers <= needed:
        raise CheckpointError(
            f"{folder}: has {layers} layers, text_encoder_select_layers needs more than {needed}"
        )
    try:
        return empty_text_model(text_config, needed, dtype)
    except ImportError:  # no fault of the checkpoint
        raise
    except Exception as error:  # whatever transformers makes of a strange config
        raise CheckpointError(f"{folder / 'config.json'}: {first_line(error)}") from None


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
    folder: Path,
    tokenizer_folder: Path,
    select_layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    resident: bool = True,
) -> TextEncoder:
    """Load the part of a Qwen3-VL checkpoint that these layers need.

    Args:
        folder: a Qwen3-VL checkpoint: its ``config.json`` and ``model*.safetensors``.
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

    model, rotary = text_model(folder, select_layers, dtype)
    files = checkpoint_files(folder, "model")
    with open_files(files) as opened:
        shapes = shapes_of(opened.tensors)
        root = next((r for r in _ROOTS if f"{r}embed_tokens.weight" in shapes), _ROOTS[0])
        check_weights(_weight_map(model, root), shapes, folder, ignore=lambda name: True)
        model = model.to_empty(device=device if resident else "cpu")
        # to_empty leaves the rotary frequencies, which no checkpoint stores, undefined.
        model.rotary_emb = rotary.to(device)
        load_weights(opened.tensors, _weight_map(model, root))
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


def text_model_units(model: nn.Module) -> list[nn.Module]:
    """Its pieces that hold weights, one of which runs at a time."""
    layers: Any = model.layers
    return [model.embed_tokens, *layers]


# Where the text model sits in a Qwen3VLModel and in a Qwen3VLForConditionalGeneration checkpoint.
_ROOTS = ("language_model.", "model.language_model.")


def _weight_map(model: nn.Module, root: str) -> dict[str, WeightSlot]:
    return {f"{root}{name}": WeightSlot(p.data) for name, p in model.named_parameters()}
