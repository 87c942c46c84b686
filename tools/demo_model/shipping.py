"""From trained modules to the file that the package carries."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from krea2_srt.demo.trained_weights import TrainedWeights


def tensors_of(dit: nn.Module, vae: nn.Module) -> dict[str, Tensor]:
    """All that training has changed, in bfloat16.

    Of causal 3-D kernels only the temporal slice that a single frame meets; of what works between
    frames nothing.
    """
    tensors = {f"transformer.{name}": tensor for name, tensor in dit.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        if "time_conv" in name:
            continue
        is_kernel = tensor.ndim == 5
        tensors[f"vae.{name}"] = tensor[:, :, -1] if is_kernel else tensor
    return {name: it.detach().to(torch.bfloat16).contiguous() for name, it in tensors.items()}


def write_weights(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write the file, and what it is said to be beside it; see `krea2_srt.demo.trained_weights`."""
    save_file(tensors, file)
    file.chmod(0o644)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    text = json.dumps({**about, "sha256": digest}, indent=1)
    file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def load_vae(weights: TrainedWeights, vae: nn.Module) -> None:
    """Load the VAE that `write_weights` has written."""
    for name, tensor in vae.state_dict().items():
        tensor.copy_(weights.vae(name, tuple(tensor.shape)))


def rounded(module: nn.Module) -> nn.Module:
    """As it will be when it is loaded again."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16))
    return module
