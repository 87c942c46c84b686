"""The released architectures with random weights, made on the device."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.released import TEXT_CONFIG, VAE_CONFIG
from krea2_srt.model.text_encoder import (
    DEFAULT_SELECT_LAYERS,
    PREFIX,
    PREFIX_TOKENS,
    SUFFIX,
    TextEncoder,
    empty_text_model,
)
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import VAEConfig


@dataclass(frozen=True)
class Architecture:
    """Sizes of a whole model.

    Attributes:
        dit: of the transformer.
        text: of the text encoder, as transformers' config names them.
        vae_dim: base width of the VAE.
    """

    dit: Krea2Config
    text: dict[str, Any]
    vae_dim: int


RELEASED = Architecture(Krea2Config(), TEXT_CONFIG, VAE_CONFIG["base_dim"])

TINY = Architecture(
    Krea2Config(
        num_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=512,
        text_hidden_dim=64,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=128,
    ),
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
    },
    16,
)
"""To run the whole benchmark on a CPU."""


def random_dit(config: Krea2Config, device: torch.device, dtype: torch.dtype) -> Krea2DiT:
    """Weights of which activations keep their size, and gates that let every block count."""
    with torch.device(device):
        dit = Krea2DiT(config, dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in dit.named_parameters():
        if name.endswith(".scale"):
            parameter.fill_(1).add_(_like(parameter, 0.1, generator))
        elif name.endswith("table"):
            parameter.copy_(_like(parameter, 0.3, generator))
        else:
            std = 0.02 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(0, std, generator=generator)
    return dit


def _like(parameter: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty_like(parameter).normal_(0, std, generator=generator)


def quantized_copy(dit: Krea2DiT, quantization: Quantization) -> Krea2DiT:
    """The same weights, with the blocks' matrices in 8 bits."""
    with torch.device(dit.img_in.weight.device):
        copy = Krea2DiT(dit.config, dit.dtype, quantization).eval()
    stored = dit.weight_map()
    with torch.no_grad():
        for name, slot in copy.weight_map().items():
            if slot.store is not None:
                slot.store(stored[name].view)
            else:
                slot.view.copy_(stored[name].view)
    copy.operations = dit.operations
    return copy


class Words:
    """In place of a tokenizer: one token a word, and the template's own."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        if text == SUFFIX:
            return {"input_ids": [1, 2, 3, 4, 5]}
        words = len(text.removeprefix(PREFIX).split())
        return {"input_ids": [7] * (PREFIX_TOKENS * text.startswith(PREFIX) + words)}


def random_text_encoder(
    architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Qwen3-VL's text model, cut after the last selected layer."""
    empty, rotary = empty_text_model(architecture.text, max(DEFAULT_SELECT_LAYERS), dtype)
    model: Any = empty.to_empty(device=device)
    model.rotary_emb = rotary.to(device)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    model.requires_grad_(False).eval()
    return TextEncoder(model, Words(), DEFAULT_SELECT_LAYERS, device)


def random_vae(width: int, device: torch.device, dtype: torch.dtype) -> VAEDecoder:
    """The Qwen-Image VAE's decoder."""
    zeros, ones = (0.0,) * 16, (1.0,) * 16
    config = VAEConfig(width, 16, (1, 2, 4, 4), 2, (False, True, True), zeros, ones)
    with torch.device(device):
        vae = VAEDecoder(config, dtype).eval()
    generator = torch.Generator(device).manual_seed(2)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            fan_in = math.prod(parameter.shape[1:])
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    return vae.to(memory_format=torch.channels_last)
