"""Writing the demo checkpoint in the released layout."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from krea2_srt.demo.text_encoder import HEAD_DIM, ROPE_THETA
from krea2_srt.demo.tokenizer import write_tokenizer
from krea2_srt.model.checkpoint import TRAINED_SIDE
from krea2_srt.model.config import CLASS_NAME as DIT_CLASS
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import config_dict, original_name, stored_shapes
from krea2_srt.model.releases import CLASS_NAME as PIPELINE_CLASS
from krea2_srt.model.text_encoder import DEFAULT_SELECT_LAYERS

DIT_CONFIG = Krea2Config(
    num_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=768,
    timestep_embed_dim=256,
    text_hidden_dim=64,
    text_num_attention_heads=1,
    text_num_key_value_heads=1,
    text_intermediate_size=256,
)

# SGLang's DiT reads these names instead of the released ones.
_SGLANG_NAMES = {
    "features": DIT_CONFIG.hidden_size,
    "heads": DIT_CONFIG.num_attention_heads,
    "kvheads": DIT_CONFIG.num_key_value_heads,
    "layers": DIT_CONFIG.num_layers,
    "txtdim": DIT_CONFIG.text_hidden_dim,
    "txtheads": DIT_CONFIG.text_num_attention_heads,
    "txtkvheads": DIT_CONFIG.text_num_key_value_heads,
}

TEXT_CONFIG = {
    "vocab_size": 151936,
    "hidden_size": DIT_CONFIG.text_hidden_dim,
    "intermediate_size": 128,
    "num_hidden_layers": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_interleaved": True,
        "mrope_section": [12, 10, 10],
    },
}
_VISION_CONFIG = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 1,
    "out_hidden_size": DIT_CONFIG.text_hidden_dim,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
}


class TextWeights(Protocol):
    """Where a text encoder's tensors come from."""

    def text_encoder(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, in bfloat16, by its released name."""


class Weights(TextWeights, Protocol):
    """Where all of a checkpoint's tensors come from.

    Attributes:
        vae_config: what the VAE's config says beside its sizes.
        trained_side: pixels of the longest side that they were trained on.
        loras: files that go into the checkpoint's folder of that name: adapters for them.
    """

    vae_config: Mapping[str, Any]
    trained_side: int
    loras: Sequence[Path]

    def transformer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the DiT."""

    def vae(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the VAE."""


def write_demo_checkpoint(folder: Path, weights: Weights, distilled: bool = True) -> None:
    """Write a complete checkpoint: the released layout, a real tokenizer.

    The folder appears whole or not at all. The same weights give the same bytes.

    Args:
        folder: must not exist, or be an empty folder; its parent must be writable.
        weights: of all parts.
        distilled: Turbo (True) or Raw (False); the weights are the same.

    Raises:
        FileExistsError: the folder holds something already.
        OSError: the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not an empty folder")
    folder = folder.resolve()  # "." and links to folders are renamed into place by their own names
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        work = Path(scratch) / "checkpoint"
        work.mkdir()
        _write_index(work, distilled, weights.trained_side)
        _write_transformer(work / "transformer", weights)
        write_text_encoder(work / "text_encoder", weights)
        _write_vae(work / "vae", weights)
        _write_scheduler(work / "scheduler")
        write_tokenizer(work / "tokenizer")
        if weights.loras:
            _write_loras(work / "loras", weights.loras)
        if folder.exists():
            folder.rmdir()
        shutil.move(work, folder)


def write_original_file(transformer: Path, file: Path) -> None:
    """Write a transformer in Diffusers layout as one file with the original release's names.

    Args:
        transformer: folder with one safetensors file.
        file: to write.
    """
    tensors = load_file(transformer / "diffusion_pytorch_model.safetensors")
    originals = {}
    for name, tensor in tensors.items():
        flat = name.startswith("transformer_blocks.") and name.endswith("scale_shift_table")
        originals[original_name(name)] = tensor.flatten() if flat else tensor
    _save(originals, file)


def _write_index(folder: Path, distilled: bool, trained_side: int) -> None:
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": PIPELINE_CLASS,
            "_diffusers_version": "0.42.1",
            TRAINED_SIDE: trained_side,
            "is_distilled": distilled,
            "patch_size": 2,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3VLModel"],
            "text_encoder_select_layers": list(DEFAULT_SELECT_LAYERS),
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", DIT_CLASS],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


def _write_transformer(folder: Path, weights: Weights) -> None:
    folder.mkdir()
    _write_json(
        folder / "config.json",
        {"_class_name": DIT_CLASS, **config_dict(DIT_CONFIG), **_SGLANG_NAMES},
    )
    shapes = stored_shapes(DIT_CONFIG)
    tensors = {name: weights.transformer(name, shape) for name, shape in shapes.items()}
    _save(tensors, folder / "diffusion_pytorch_model.safetensors")


def write_text_encoder(folder: Path, weights: TextWeights) -> None:
    """Write this part alone."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig(
        text_config=TEXT_CONFIG, vision_config=_VISION_CONFIG, tie_word_embeddings=True
    )
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Qwen3VLModel(config).named_parameters()}
    config.architectures = ["Qwen3VLModel"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tensors = {name: weights.text_encoder(name, shape) for name, shape in shapes.items()}
    _save(tensors, folder / "model.safetensors")


def _write_vae(folder: Path, weights: Weights) -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**VAE_CONFIG, **weights.vae_config)
    vae.save_config(folder)
    shapes = ((name, tuple(p.shape)) for name, p in vae.named_parameters())
    tensors = {name: weights.vae(name, shape) for name, shape in shapes}
    _save(tensors, folder / "diffusion_pytorch_model.safetensors")


def _write_scheduler(folder: Path) -> None:
    folder.mkdir()
    _write_json(
        folder / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 6400,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
        },
    )


def _write_loras(folder: Path, files: Sequence[Path]) -> None:
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name).chmod(0o644)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; a server may run as another user.
    file.chmod(0o644)
