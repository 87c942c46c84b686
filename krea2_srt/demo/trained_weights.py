"""The trained weights that come with the package; tools/demo_model has made them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from krea2_srt.demo.random_weights import normal
from krea2_srt.demo.text_encoder import encoder_tensor
from krea2_srt.errors import CheckpointError

RECIPE = 4
"""Goes up with whatever in tools/demo_model makes the weights others."""

WEIGHTS = Path(__file__).parent / f"weights-{RECIPE}.safetensors"

SEPIA = WEIGHTS.with_name("sepia.safetensors")
"""An adapter for them; tools/demo_model/adapter.py has made it. The YAML beside it presents it."""

_TEXT_SEED = 0


class TextEncoderWeights:
    """The text encoder's, which every recipe has in common: they follow from a seed."""

    def text_encoder(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "visual" in name:
            return torch.zeros(shape, dtype=torch.bfloat16)  # nobody shows it a picture
        return encoder_tensor(name, shape, _random).to(torch.bfloat16)


def _random(name: str, shape: tuple[int, ...], std: float) -> Tensor:
    return normal(name, shape, _TEXT_SEED, std).float()


class TrainedWeights(TextEncoderWeights):
    """Weights of a recipe: the DiT's and the VAE's from a file.

    Args:
        file: made by the recipe; what it is said to be is beside it, as JSON.

    Attributes:
        about: what the recipe says: its version, the checksum, what was measured.
        loras: files of the adapters for these weights, and only for these.

    Raises:
        CheckpointError: the file is missing, or not the one that the recipe has made.
    """

    vae_config: Mapping[str, Any]
    trained_side: int
    loras: Sequence[Path]

    def __init__(self, file: Path = WEIGHTS) -> None:
        try:
            content = file.read_bytes()
            self.about: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
            digest, self.vae_config = self.about["sha256"], self.about["vae_config"]
            self.trained_side = self.about["trained_side"]
        except KeyError as error:
            raise CheckpointError(f"{file.with_suffix('.json')} lacks {error}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the demo's weights cannot be read: {error}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{file} is damaged: its checksum is not that of its recipe")
        self._tensors = load(content)
        self.loras = (SEPIA, SEPIA.with_suffix(".yaml")) if file == WEIGHTS else ()

    def transformer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensors[f"transformer.{name}"].view(shape)

    def vae(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "time_conv" in name:
            return torch.zeros(shape, dtype=torch.bfloat16)  # between frames, of which there is one
        stored = self._tensors[f"vae.{name}"]
        if len(shape) < 5:
            return stored.view(shape)
        # Of a causal 3-D kernel a single frame meets the last temporal slice alone.
        kernel = torch.zeros(shape, dtype=torch.bfloat16)
        kernel[:, :, -1] = stored
        return kernel
