"""The released architectures, as small as they can be: here only what is queued counts."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from krea2_bench.gpu.models import TINY, Words, random_dit
from krea2_srt.kernels.operations import default_operations
from krea2_srt.model.checkpoint import SamplingDefaults
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.text_encoder import TextEncoder, empty_text_model
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.runner.attention import AttentionChoice, known_backends
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.upload_stream import CudaUploadStream
from tests.torch.cuda_rules.tensors import CUDA

LAYERS = (0, 1)
"""Layers of the text encoder whose hidden states are read."""

SMALL = Krea2Config(
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=512,
    num_text_layers=len(LAYERS),
    text_hidden_dim=64,
    text_num_attention_heads=1,
    text_num_key_value_heads=1,
    text_intermediate_size=128,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
)


def small_runner(
    quantization: Quantization | None = None,
    blocks: int = SMALL.num_layers,
    streamed: Collection[int] = (),
) -> Krea2Runner:
    """On the device of the rules, loaded and at rest; without graphs.

    Args:
        quantization: of the blocks.
        blocks: how many.
        streamed: those that come from host memory.
    """
    dtype, sizes = torch.bfloat16, replace(SMALL, num_layers=blocks)
    if quantization is None and not streamed:
        dit = random_dit(sizes, CUDA, dtype)
    else:
        with torch.device(CUDA):
            dit = Krea2DiT(sizes, dtype, quantization, on_host=streamed).eval()
    dit.operations = default_operations(CUDA)
    text, rotary = empty_text_model(TINY.text, max(LAYERS), dtype)
    model: Any = text.to_empty(device=CUDA)
    model.rotary_emb = rotary.to(CUDA)
    encoder = TextEncoder(model.requires_grad_(False).eval(), Words(), LAYERS, CUDA)
    zeros = (0.0,) * 16
    config = VAEConfig(16, 16, (1, 1, 1, 1), 0, (False, True, True), zeros, zeros)
    with torch.device(CUDA):
        vae = VAEDecoder(config, dtype).eval()
    vae = vae.to(memory_format=torch.channels_last)
    vae.use_kernels(True)
    backend = known_backends()["torch_varlen"]
    runner = Krea2Runner(
        dit, encoder, vae, SamplingDefaults(True), AttentionChoice(backend, backend)
    )
    if streamed:
        runner.stream_blocks(CudaUploadStream(CUDA))
    torch.cuda.synchronize()
    return runner
