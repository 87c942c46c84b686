"""Writing the demo checkpoint in the released layout."""

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from krea2_srt.demo.tokenizer import write_tokenizer
from krea2_srt.model.checkpoint import config_dict, original_name, stored_shapes
from krea2_srt.model.config import CLASS_NAME as DIT_CLASS
from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.checkpoint import CLASS_NAME as PIPELINE_CLASS
from krea2_srt.runner.text_encoder import DEFAULT_TAPS

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

_TEXT_CONFIG = {
    "vocab_size": 151936,
    "hidden_size": DIT_CONFIG.text_hidden_dim,
    "intermediate_size": 128,
    "num_hidden_layers": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000,
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
_VAE_CONFIG = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def write_demo_checkpoint(folder: Path, seed: int = 0, distilled: bool = True) -> None:
    """Write a complete checkpoint: random weights, real layout, real tokenizer.

    The folder appears whole or not at all. The same seed gives the same bytes.

    Args:
        folder: must not exist, or be an empty folder; its parent must be writable.
        seed: of the weights.
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
        _write_index(work, distilled)
        _write_transformer(work / "transformer", seed)
        _write_text_encoder(work / "text_encoder", seed)
        _write_vae(work / "vae", seed)
        _write_scheduler(work / "scheduler")
        write_tokenizer(work / "tokenizer")
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


def _write_index(folder: Path, distilled: bool) -> None:
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": PIPELINE_CLASS,
            "_diffusers_version": "0.42.1",
            "is_distilled": distilled,
            "patch_size": 2,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3VLModel"],
            "text_encoder_select_layers": list(DEFAULT_TAPS),
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", DIT_CLASS],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
    )


def _write_transformer(folder: Path, seed: int) -> None:
    folder.mkdir()
    _write_json(
        folder / "config.json",
        {"_class_name": DIT_CLASS, **config_dict(DIT_CONFIG), **_SGLANG_NAMES},
    )
    tensors = {
        name: _dit_tensor(name, shape, seed) for name, shape in stored_shapes(DIT_CONFIG).items()
    }
    _save(tensors, folder / "diffusion_pytorch_model.safetensors")


def _write_text_encoder(folder: Path, seed: int) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    config = Qwen3VLConfig(
        text_config=_TEXT_CONFIG, vision_config=_VISION_CONFIG, tie_word_embeddings=True
    )
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Qwen3VLModel(config).named_parameters()}
    config.architectures = ["Qwen3VLModel"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tensors = {name: _encoder_tensor(name, shape, seed) for name, shape in shapes.items()}
    _save(tensors, folder / "model.safetensors")


def _write_vae(folder: Path, seed: int) -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**_VAE_CONFIG)
    vae.save_config(folder)
    shapes = ((name, tuple(p.shape)) for name, p in vae.named_parameters())
    tensors = {name: _vae_tensor(name, shape, seed) for name, shape in shapes}
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


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; a server may run as another user.
    file.chmod(0o644)


def _normal(name: str, shape: Iterable[int], seed: int, std: float) -> Tensor:
    """Seeded by name, so that no tensor depends on the order in which a library lists them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return (torch.randn(tuple(shape), generator=generator) * std).to(torch.bfloat16)


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape[1:]))


# The scales below make a random network show what tests must see: prompt, seed and number of steps
# each change the picture, which has structure and contrast (tests/cli/test_demo_model.py).


def _dit_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    block = name.startswith("transformer_blocks.")
    if name == "final_layer.linear.weight":
        return _final_weight(name, shape, seed)
    if name == "time_embed.linear_1.weight":
        return _time_weight(name, shape, seed)
    if "scale_shift_table" in name:
        return _normal(name, shape, seed, 0.3)
    if block and "attn.norm" in name:
        # Queries and keys longer than usual: attention prefers few tokens, and which ones
        # changes with the position, so the prompt's tokens draw patterns.
        return (_normal(name, shape, seed, 0.1).float() + 0.75).to(torch.bfloat16)
    if "norm" in name:
        return _normal(name, shape, seed, 0.1)
    if name == "img_in.bias":
        return _normal(name, shape, seed, 1.0)  # what all image tokens have in common
    if name == "txt_in.linear_2.bias":
        return torch.zeros(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return _normal(name, shape, seed, 0.1)
    gain = 3.0 if block and ("to_v" in name or "to_out" in name) else 1.0
    return _normal(name, shape, seed, gain * _fan_in(shape) ** -0.5)


def _time_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Smooth in time, as a trained network is: fast sinusoids count less. Without it the rounding
    of the timestep to bf16, which Diffusers does and SGLang does not, would give other pictures.
    """
    half = shape[1] // 2
    radians_per_unit_time = 1e3 * torch.exp(-math.log(1e4) * torch.arange(half) / half)
    share = (20.0 / radians_per_unit_time).clamp(max=1.0).repeat(2)
    share /= share.square().mean().sqrt()
    weight = _normal(name, shape, seed, _fan_in(shape) ** -0.5).float() * share
    return weight.to(torch.bfloat16)


def _final_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Mostly the same for the four latents of a patch, so that structure is wider than one patch,
    plus the inverse of the input projection, so that the velocity points away from the noise.
    """
    std = 1.5 * _fan_in(shape) ** -0.5
    patches = _normal(f"{name}/patch", (shape[0] // 4, shape[1]), seed, std).float()
    detail = _normal(name, shape, seed, 0.3 * std).float()
    img_in = _dit_tensor("img_in.weight", (shape[1], shape[0]), seed).float()
    weight = patches.repeat_interleave(4, 0) + detail + 3.0 * torch.linalg.pinv(img_in)
    return weight.to(torch.bfloat16)


def _encoder_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return (1 + _normal(name, shape, seed, 0.1).float()).to(torch.bfloat16)
    if "embed" in name:
        return _normal(name, shape, seed, 1.0)
    return _normal(name, shape, seed, _fan_in(shape) ** -0.5)


def _vae_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("gamma"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return _normal(name, shape, seed, 0.05)
    # Causal 3-D kernels see one frame: only their last temporal slice counts as fan-in.
    fan_in = _fan_in(shape) // (shape[2] if len(shape) == 5 else 1)
    gain = 0.45 if name == "decoder.conv_out.weight" else 1.0
    return _normal(name, shape, seed, gain * fan_in**-0.5)
