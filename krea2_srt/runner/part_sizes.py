"""How much memory the parts of a model take, read off the modules themselves."""

from collections.abc import Iterable

import torch
from torch import nn

from krea2_srt.engine.step_scheduler import MAX_ENCODED_TOGETHER
from krea2_srt.model.checkpoint import dit_config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.weights import parse_json
from krea2_srt.runner.checkpoint import Krea2Checkpoint
from krea2_srt.runner.graphs import MAX_SEGMENTS
from krea2_srt.runner.memory_plan import PartSizes
from krea2_srt.runner.text_encoder import MAX_ENCODED_TOKENS, text_model, text_model_units
from krea2_srt.runner.text_graphs import MAX_KEPT, MAX_LENGTH, MAX_ROWS
from krea2_srt.runner.vae import VAEConfig, VAEDecoder, default_tile

_LIVE_IMAGES = 5
"""Tensors of a picture's size that a decode holds at its fullest: a residual block's input, norm
and outputs, and a convolution's workspace."""


def checkpoint_sizes(
    checkpoint: Krea2Checkpoint,
    dtype: torch.dtype,
    text_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    quantization: Quantization | None,
    device: torch.device,
) -> PartSizes:
    """Of a checkpoint, of which only configs are read.

    Args:
        checkpoint: where they lie.
        dtype, text_dtype, vae_dtype: of the DiT, the text encoder and the VAE.
        quantization: of the DiT's blocks.
        device: where it will run.
    """
    with torch.device("meta"):
        dit = Krea2DiT(dit_config(checkpoint.transformer), dtype, quantization)
        vae_config = parse_json(checkpoint.vae / "config.json", VAEConfig.from_dict)
        vae = VAEDecoder(vae_config, vae_dtype)
    text, _ = text_model(checkpoint.text_encoder, checkpoint.taps, text_dtype)
    return part_sizes(dit, text, vae, default_tile(device))


def part_sizes(dit: Krea2DiT, text: nn.Module, vae: VAEDecoder, tile: int) -> PartSizes:
    """Of modules, which may be on the meta device.

    Args:
        dit, text, vae: the parts.
        tile: pixels a side of the tiles of a decode.
    """
    config, element = dit.config, dit.dtype.itemsize
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    # Of the MLP: the stream, its norm, gate and up, and their product. Attention takes less: the
    # norm, the fused projection, the output, and where a back end asks for them repeated keys.
    mlp = 2 * hidden + 3 * config.intermediate_size
    projection = 2 * hidden + 2 * config.num_key_value_heads * head_dim
    attention = 2 * hidden + projection + hidden + 2 * hidden
    encoded = MAX_ENCODED_TOGETHER * MAX_ENCODED_TOKENS
    sizes = text.config
    states = (sizes.num_hidden_layers + 1 + config.num_text_layers) * sizes.hidden_size
    text_element = next(text.parameters()).dtype.itemsize
    pixel = _LIVE_IMAGES * vae.dtype.itemsize * vae.config.base_dim
    modulation = config.num_layers * 2 * hidden * (4 + 4 + element) + 2 * 4 * hidden
    prompts = 8 * MAX_ROWS * MAX_LENGTH + (8 + hidden * element) * MAX_KEPT
    return PartSizes(
        dit=num_bytes([dit]),
        text_encoder=num_bytes([text]),
        vae=num_bytes([vae]),
        text_encoder_unit=max(num_bytes([unit]) for unit in text_model_units(text)),
        step_per_token=max(mlp, attention) * element,
        # The stream, patches and velocities.
        held_per_token=hidden * element + 2 * 4 * config.in_channels,
        encode=encoded * (states + 3 * sizes.intermediate_size) * text_element,
        # Half the width and height, at twice the channels, for the whole image; then in tiles.
        decode_per_pixel=pixel * 2 // 4,
        decode_tile=pixel * tile * tile,
        graph_buffers=MAX_SEGMENTS * modulation + prompts,
        # Patches and velocities, contexts, rotations, and what says where they belong.
        graph_per_token=2 * 4 * config.in_channels + hidden * element + 4 * head_dim + 9,
        quantized=dit.quantization is not None,
    )


def num_bytes(modules: Iterable[nn.Module]) -> int:
    """Of all parameters."""
    return sum(p.nbytes for module in modules for p in module.parameters())
