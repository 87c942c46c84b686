"""How much memory the parts of a model take, read off the modules themselves."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from krea2_srt.engine.step_scheduler import MAX_ENCODED_TOGETHER
from krea2_srt.kernels.products import INT8_SUMS_BYTES
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import dit_config
from krea2_srt.model.layers import Linear
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.text_encoder import MAX_ENCODED_TOKENS, text_model, text_model_units
from krea2_srt.model.text_fusion import TOKENS_AT_ONCE
from krea2_srt.model.vae import BYTES_PER_SCORE, VAEDecoder, default_tile, scores_within
from krea2_srt.model.vae_files import vae_config
from krea2_srt.runner.gpu import Gpu
from krea2_srt.runner.graphs import MAX_PROMPT_LENGTH, MAX_PROMPT_TOKENS, MAX_PROMPTS, MAX_SEGMENTS
from krea2_srt.runner.memory_sizes import DecodeSizes, PartSizes

_WORKSPACE, _WORKSPACE_HOPPER = 8320 * 2**10, 32 * 2**20
"""Bytes of cuBLAS's workspace on a stream, as torch allocates it: four times as much from Hopper
on.
"""

_STREAMS = 4
"""That multiply matrices: of steps, of decodes, and those on which each kind of graph is captured.
"""

_CONVOLUTIONS = 64 * 2**20
"""An allowance for cuDNN. Of its kernels for channels innermost, those that its heuristics choose
need no workspace or little; what a GPU takes is not measured."""


def checkpoint_sizes(
    checkpoint: Krea2Checkpoint,
    dtype: torch.dtype,
    text_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    quantization: Quantization | None,
) -> PartSizes:
    """Sizes of a checkpoint's parts; only its configs are read, and the headers of single
    files. `on_gpu` makes them those of a GPU.

    Args:
        checkpoint: where they lie.
        dtype, text_dtype, vae_dtype: of the DiT, the text encoder and the VAE.
        quantization: of the DiT's blocks.
    """
    with torch.device("meta"):
        dit = Krea2DiT(dit_config(checkpoint.transformer), dtype, quantization)
        vae = VAEDecoder(vae_config(checkpoint.vae), vae_dtype)
    text, _ = text_model(checkpoint.text_encoder, checkpoint.select_layers, text_dtype)
    return part_sizes(dit, text, vae, default_tile(torch.device("cuda")), scores=1)


def on_gpu(sizes: PartSizes, gpu: Gpu) -> PartSizes:
    """The same with what depends on the GPU: scores that are computed at a time, and workspaces."""
    # Attention in float32 has no scores in memory, wherever it runs.
    scores = BYTES_PER_SCORE * scores_within(gpu.total) if sizes.decoder.score_bytes else 0
    decoder = replace(sizes.decoder, score_bytes=scores)
    return replace(sizes, decoder=decoder, libraries=workspace_of(gpu.capability))


def workspace_of(capability: tuple[int, int]) -> int:
    """What libraries allocate for themselves, through torch, on a GPU of a compute capability."""
    hopper = capability >= (9, 0)
    # Two on each stream: torch's default shares one between cuBLAS and cuBLASLt, settings may not.
    return 2 * _STREAMS * (_WORKSPACE_HOPPER if hopper else _WORKSPACE) + _CONVOLUTIONS


def part_sizes(
    dit: Krea2DiT,
    text: nn.Module,
    vae: VAEDecoder,
    tile: int,
    scores: int = 0,
    libraries: int = 0,
) -> PartSizes:
    """Sizes of modules, which may be on the meta device.

    Args:
        dit, text, vae: the parts.
        tile: pixels a side of the tiles of a decode.
        scores: of the VAE's attention, computed at a time.
        libraries: bytes of their workspaces.
    """
    config, element = dit.config, dit.dtype.itemsize
    hidden, patch = config.hidden_size, 4 * config.in_channels
    # Scales and shifts in float32 and gates, before attention and MLP, and of the final layer.
    row = config.num_layers * 2 * hidden * (4 + 4 + element) + 2 * 4 * hidden
    encodes = range(1, MAX_ENCODED_TOGETHER + 1)
    prompts = 8 * MAX_PROMPTS * MAX_PROMPT_LENGTH + (8 + hidden * element) * MAX_PROMPT_TOKENS
    int8 = dit.quantization is not None and dit.quantization.format == "int8"
    return PartSizes(
        dit=num_bytes([dit]),
        text_encoder=num_bytes([text]),
        vae=num_bytes([vae]),
        blocks=tuple(num_bytes([block]) for block in dit.blocks),
        text_encoder_unit=max(num_bytes([unit]) for unit in text_model_units(text)),
        step_per_token=max(_block_per_token(block, config, element) for block in dit.blocks)
        + patch,
        # The stream and the patches.
        paused_per_token=hidden * element + patch,
        modulation_row=row,
        # As lists of vectors and as the tensors that these become, and the vectors of a block.
        schedule_row=2 * row + 2 * 6 * 4 * hidden,
        patch=patch,
        context=hidden * element,
        encodes=tuple(_encode(dit, text, count * MAX_ENCODED_TOKENS) for count in encodes),
        encode_graph=_encode(dit, text, MAX_PROMPTS * MAX_PROMPT_LENGTH),
        decoder=decode_sizes(vae, tile, scores),
        libraries=libraries,
        graph_buffers=MAX_SEGMENTS * row + prompts,
        # Patches and velocities, contexts, rotations, and what says where they belong.
        graph_per_token=2 * patch + hidden * element + 4 * config.attention_head_dim + 9,
        int8_sums=INT8_SUMS_BYTES if int8 else 0,
        quantized=dit.quantization is not None,
    )


def _block_per_token(block: Any, config: Krea2Config, element: int) -> int:
    """Bytes per token of a step in one block, at its fullest moment."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + config.num_key_value_heads

    def read_by(linear: Linear, width: int) -> int:
        format = linear.format  # 8 bits and a scale, where it is quantised
        return width * element if format is None else width * format.dtype.itemsize + 4

    stream = hidden * element
    # Each holds the stream and what its first matrix reads. The MLP's fullest moment is when gate
    # and up become their product; that of attention when a back end has repeated keys and values,
    # or the last of three more tensors is made.
    in_mlp = read_by(block.ff.gate_up, hidden) + 2 * mlp * element + read_by(block.ff.down, mlp)
    in_attention = (
        read_by(block.attn.qkvg, hidden) + 2 * heads * config.attention_head_dim * element
    )
    in_attention += stream + max(2 * stream, read_by(block.attn.out, hidden) + stream)
    return stream + max(in_mlp, in_attention)


def _encode(dit: Krea2DiT, text: nn.Module, tokens: int) -> int:
    """Bytes for encoding so many tokens of prompts and templates, from ids to contexts."""
    config, sizes = dit.config, cast(Any, text.config)
    width, element = sizes.hidden_size, next(text.parameters()).dtype.itemsize
    # All states that transformers keeps, and in the last layer the norm, gate, its SiLU and up.
    states = (sizes.num_hidden_layers + 1) * width
    encoder = tokens * (states + width + 3 * sizes.intermediate_size) * element
    # The states that are read and what they become, and of those that are fused together: in and
    # out of the block, the fused projection and attention's output before its MLP, whose input,
    # gate and up, SiLU and product are the rest.
    layers, width, element = config.num_text_layers, config.text_hidden_dim, dit.dtype.itemsize
    heads = config.text_num_attention_heads + config.text_num_key_value_heads
    fused = 4 * width + 2 * heads * config.text_head_dim + 4 * config.text_intermediate_size
    fusion = min(tokens, TOKENS_AT_ONCE) * layers * fused * element
    return max(encoder, tokens * (layers + 1) * width * element + fusion)


def decode_sizes(vae: VAEDecoder, tile: int, scores: int) -> DecodeSizes:
    """Sizes of a VAE's decode; see `VAEDecoder.decode_slices`."""
    element = vae.dtype.itemsize
    stages = [[_block_channels(block) for block in resnets] for resnets in vae.up_resnets]
    full = len(stages) - 1
    whole = []
    for stage, blocks in enumerate(stages[:-1]):
        # Tensors here have 1 / share as many elements a channel as the picture has pixels.
        share = 4 ** (full - stage)
        whole += [channels / share for channels in blocks]
        if stage < full - 1:
            whole.append(_channels(vae.upsamplers[stage]) * (1 / share + 1.5 * 4 / share))
    width = _channels(vae.upsamplers[-1])
    attention = vae.mid_attention.to_qkv.weight.shape[1] / 4**full
    return DecodeSizes(
        whole_per_pixel=max(whole) * element,
        # What tiles are cut from, and float32 pixels.
        kept_per_pixel=width / 4 * element + 3 * 4,
        tile_per_pixel=max(1.5 * width, *stages[-1]) * element,
        tile=tile + 2 * (vae.margin + 1) if tile else 0,
        # Its input, the fused projection, scaled queries and the result.
        attention_per_pixel=6 * attention * element,
        score_bytes=BYTES_PER_SCORE * scores if vae.dtype is not torch.float32 else 0,
        score_pixels=4**full,
    )


def _channels(module: Any) -> int:
    """That a convolution of an upsampler reads."""
    return int(module.conv.weight.shape[1])


def _block_channels(block: Any) -> int:
    """Channels of all tensors of a residual block's size, at its fullest moment."""
    outputs, inputs = block.conv1.weight.shape[:2]
    if block.conv_shortcut is None:
        return int(inputs + max(inputs + outputs, 2 * outputs))
    return int(inputs + outputs + max(inputs + outputs, 2 * outputs))


def num_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for module in modules for p in module.parameters())
