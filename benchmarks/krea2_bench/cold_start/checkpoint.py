"""The demo checkpoint with gigabytes that cost nothing to compute: to be loaded, not looked at."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def write_large_checkpoint(source: Path, folder: Path, gigabytes: float) -> None:
    """Copy a demo checkpoint, with zeros for the MLPs of its text encoder.

    Only prompts go through these. A transformer as large would keep a CPU busy for minutes, while
    the engine times its packs.

    Args:
        source: the demo.
        folder: to write; must not be there.
        gigabytes: 1e9 bytes of the text encoder's file, about.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("loras"))
    encoder = folder / "text_encoder"
    config = json.loads((encoder / "config.json").read_text())
    text = config["text_config"]
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    width = int(gigabytes * 1e9 / (2 * len(_MATRICES) * layers * hidden))
    text["intermediate_size"] = width
    (encoder / "config.json").write_text(json.dumps(config))
    tensors = load_file(encoder / "model.safetensors")
    for name in tensors:
        if name.startswith("language_model.") and name.endswith(_MATRICES):
            shape = (hidden, width) if "down_proj" in name else (width, hidden)
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
