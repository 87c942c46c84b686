"""Random adapters in the form that Diffusers, SGLang and we read."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 16
_FUSION = ("text_fusion", "time_embed", "time_mod_proj", "txt_in")
"""Matrices that no step multiplies with: who trains blocks alone leaves them."""


def write_adapter(transformer: Path, file: Path, seed: int, rank: int = RANK) -> None:
    """An adapter for the matrices of a checkpoint's blocks, and what is before and behind them.

    Args:
        transformer: folder of the checkpoint's transformer.
        file: to write.
        seed: adapters of different seeds are different.
        rank: of each matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for weights in sorted(transformer.glob("*.safetensors")):
        with safe_open(weights, framework="pt") as stored:
            for key in sorted(stored.keys()):
                shape = stored.get_slice(key).get_shape()
                name = key.removesuffix(".weight")
                if len(shape) != 2 or name == key or name.startswith(_FUSION):
                    continue
                out, width = shape
                # So large that pictures with and without can be told apart, and are still pictures.
                down = torch.randn(rank, width, generator=generator) / width**0.5
                up = torch.randn(out, rank, generator=generator) * 0.05
                tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
                tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    metadata = {"transformer.r": rank, "transformer.lora_alpha": rank}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
