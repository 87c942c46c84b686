"""The same factors as every trainer writes them: each form of docs/lora.md's table."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import original_name
from krea2_srt.model.matrices import dit_matrices


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix: ``alpha / rank * up @ down``."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)

    def delta(self) -> Tensor:
        """What is added to the matrix, float64."""
        return self.scale * self.up.double() @ self.down.double()


Pairs = dict[str, Pair]
"""By Diffusers name of the matrix."""


def random_pair(
    shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator
) -> Pair:
    """As large as the weights of the demo checkpoint, about."""
    out, width = shape
    down = torch.randn(rank, width, generator=generator) / width**0.5
    return Pair(down, torch.randn(out, rank, generator=generator) / rank**0.5, alpha)


def random_pairs(config: Krea2Config, rank: int = 4, alpha: float = 2.0, seed: int = 0) -> Pairs:
    """Factors of all matrices of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_pair(matrix.shape, rank, alpha, generator)
        for name, matrix in dit_matrices(config).items()
    }


def with_alpha_of_rank(pairs: Pairs) -> Pairs:
    """The same where trainers store no alpha."""
    return {name: replace(pair, alpha=float(len(pair.down))) for name, pair in pairs.items()}


def original(name: str) -> str:
    """The original code's name of a matrix."""
    return original_name(f"{name}.weight").removesuffix(".weight")


def flat(name: str) -> str:
    return name.replace(".", "_")


def same(name: str) -> str:
    return name


def dots_guessed(name: str) -> str:
    """As musubi's converter makes them of names with underscores: dots between all parts."""
    return (
        original(name)
        .replace("layerwise_blocks", "layerwise.blocks")
        .replace("refiner_blocks", "refiner.blocks")
    )


AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")


def tensors_of(
    pairs: Pairs,
    module: Callable[[str], str],
    ends: tuple[str, str] = AB,
    *,
    alpha: bool,
    join: str = ".",
) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        pairs: what it is to say.
        module: the trainer's name of a matrix.
        ends: of the keys of down and up.
        alpha: whether each module has its own.
        join: between the two.
    """
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{module(name)}{join}{ends[0]}"] = pair.down
        tensors[f"{module(name)}{join}{ends[1]}"] = pair.up
        if alpha:
            tensors[f"{module(name)}.alpha"] = torch.tensor(pair.alpha)
    return tensors


@dataclass(frozen=True)
class Form:
    """How a trainer writes.

    Attributes:
        name: the trainer's.
        prefix: of all keys.
        module: its name of a matrix.
        ends: of its keys.
        alpha: whether alpha is a tensor in the file.
        join: between a module's name and the end.
        config: ``folder`` or ``metadata``, where PEFT's config says alpha.
        only: which matrices it trains.
    """

    name: str
    prefix: str
    module: Callable[[str], str]
    ends: tuple[str, str] = AB
    alpha: bool = False
    join: str = "."
    config: str = ""
    only: Callable[[str], bool] = field(default=lambda name: True)

    def meant(self, pairs: Pairs) -> Pairs:
        """What a file of this form can say of some factors."""
        some = {name: pair for name, pair in pairs.items() if self.only(name)}
        return some if self.alpha or self.config else with_alpha_of_rank(some)

    def write(self, pairs: Pairs, folder: Path) -> Path:
        """Write them; returns what is to be read."""
        meant = self.meant(pairs)
        tensors = tensors_of(
            meant,
            lambda name: self.prefix + self.module(name),
            self.ends,
            alpha=self.alpha,
            join=self.join,
        )
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if self.config == "folder":
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(peft_fields(meant.values())))
            return folder
        metadata = {"format": "pt"}
        if self.config == "metadata":
            fields = {f"transformer.{k}": v for k, v in peft_fields(meant.values()).items()}
            metadata["lora_adapter_metadata"] = json.dumps(fields)
        file = folder / "adapter.safetensors"
        save_file(tensors, file, metadata=metadata)
        return file


def peft_fields(pairs: Iterable[Pair]) -> dict[str, object]:
    """PEFT's config, of factors that are alike."""
    (rank,) = {len(pair.down) for pair in pairs}
    (alpha,) = {pair.alpha for pair in pairs}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": False}


def holds_blocks(name: str) -> bool:
    """What ai-toolkit trains."""
    return "blocks" in name


FORMS = (
    Form("diffusers", "transformer.", same, config="metadata"),
    Form("diffusers without metadata", "transformer.", same),
    Form("diffusers' default targets", "transformer.", same, only=lambda n: "ff.gate" not in n),
    Form("ai-toolkit", "diffusion_model.", original, only=holds_blocks),
    Form("ai-toolkit, peft's prefix", "base_model.model.", original),
    Form("musubi", "lora_unet_", lambda n: flat(original(n)), DOWN_UP, alpha=True),
    Form("musubi's convert_lora", "diffusion_model.", dots_guessed),
    Form("onetrainer, kohya", "lora_unet_", lambda n: flat(original(n)), DOWN_UP, alpha=True),
    Form("onetrainer, comfy", "diffusion_model.", original, DOWN_UP, alpha=True),
    Form("onetrainer, comfy A/B", "diffusion_model.", original, AB, alpha=True),
    Form("onetrainer, diffusers", "transformer.", same, AB, alpha=True),
    Form("onetrainer, legacy", "transformer.", same, DOWN_UP, alpha=True),
    Form("peft folder", "base_model.model.", same, config="folder"),
    Form("peft folder, original names", "base_model.model.", original, config="folder"),
    Form("diffsynth", "", original, ("lora_A.default.weight", "lora_B.default.weight")),
    Form("comfyui, bare diffusers", "", same),
    Form("comfyui, diffusion_model", "diffusion_model.", same, alpha=True),
    Form("comfyui, lycoris", "lycoris_", flat, DOWN_UP, alpha=True),
    Form("comfyui, lora.up", "transformer.", same, ("lora.down.weight", "lora.up.weight")),
    Form("comfyui, _lora.up", "", same, ("lora.down.weight", "lora.up.weight"), join="_"),
    Form("comfyui, mochi", "diffusion_model.", original, ("lora_A", "lora_B")),
    Form(
        "comfyui, transformers",
        "diffusion_model.",
        original,
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ),
)
