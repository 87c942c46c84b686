"""A small DiT: what its checkpoint holds, and what it computes."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.dit_files import load_dit, original_name, stored_shapes
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Segments
from krea2_srt.model.quantization import Quantization
from krea2_srt.runner.packing import build_pack
from krea2_srt.runner.sequence_shape import SequenceShape
from tests.comparisons import CPU
from tests.dialects import write_plain

CONFIG = Krea2Config(
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=256,
    timestep_embed_dim=32,
    text_hidden_dim=64,
    num_text_layers=3,
    text_num_attention_heads=1,
    text_num_key_value_heads=1,
    text_intermediate_size=96,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
)
MATRICES_OF_BLOCKS = 8 * CONFIG.num_layers
MATRIX = "blocks.1.attn.wk"
"""One of a block, [128, 256]."""


@cache
def state_dict() -> dict[str, Tensor]:
    """Tensors by the names of the original single file; treat them as read-only."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in stored_shapes(CONFIG).items():
        tensor = torch.randn(shape, generator=generator) / max(shape[-1], 16) ** 0.5
        original = original_name(name)
        found[original] = tensor.flatten() if original.endswith("mod.lin") else tensor
    return found


def load(file: Path, quantization: Quantization | None = None) -> Krea2DiT:
    return load_dit(file, CPU, torch.float32, quantization)


def twin(meant: dict[str, Tensor], folder: Path, quantization: Quantization | None = None):
    """The model of what a file means, from a file in float32."""
    file = folder / "twin.safetensors"
    write_plain(meant, file, dtype=torch.float32)
    return load(file, quantization)


@torch.inference_mode()
def velocity(dit: Krea2DiT) -> Tensor:
    """What it computes of an image of 6x5 tokens and a prompt of 7."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(30, CONFIG.in_channels, generator=generator)
    states = torch.randn(7, CONFIG.num_text_layers, CONFIG.text_hidden_dim, generator=generator)
    pack = build_pack([SequenceShape(7, 6, 5)], dit.config, CPU)
    context = pack.place(pack.text_spans, [dit.fuse_text(states, Segments.of([7], CPU))])
    rows = Modulation.stack([dit.modulation(torch.tensor([0.6]))])
    found = dit(pack.place(pack.image_spans, [image]), context, pack, rows)
    ((start, end),) = pack.image_spans
    return found[start:end]
