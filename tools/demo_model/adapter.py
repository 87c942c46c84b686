"""Trains the demo checkpoint's adapter, everything in sepia, from a seed, for the package.

``python -m tools.demo_model.adapter``: four minutes on two CPU cores. It is a LoRA as others make
them, by Diffusers and PEFT. It fits the weights of one training: after another it is trained again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from krea2_srt.demo.checkpoint import write_demo_checkpoint
from krea2_srt.demo.trained_weights import SEPIA, TrainedWeights
from krea2_srt.model.text_encoder import DEFAULT_SELECT_LAYERS, load_text_encoder
from tools.demo_model.autoencoder import Codec, new_autoencoder, to_bytes, to_tensor
from tools.demo_model.dataset import Dataset
from tools.demo_model.diffusion import draw_sigmas, velocity
from tools.demo_model.evaluate import ImageGenerator
from tools.demo_model.reading import draw_captions
from tools.demo_model.sepia import distance_from_sepia, in_sepia
from tools.demo_model.shipping import load_vae

RANK = 8
SIDE = 96
"""Pixels of the pictures that are trained on."""

PICTURES = 420
_BATCH = 24
_LR = 1e-2
_WARM_UP = 20
"""Steps until the learning rate is reached."""

WANTED = 20.0
"""Distance from sepia at scale 1, at most."""

PROMPTS = (
    "a yellow star on a blue background",
    "a white heart on a purple background",
    "a black ring on a cyan background",
    "a red square on a pink background",
)
"""What is looked at: light and dark, so that shapes are still seen without their colours."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.adapter", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=SEPIA, help="safetensors file")
    args = parser.parse_args(argv)
    # What is nearly learned has tiny gradients, with which a CPU calculates many times slower.
    torch.set_flush_denormal(True)
    try:
        about = make(args.output, args.steps, args.seed)
    except ValueError as error:
        sys.exit(f"tools.demo_model.adapter: error: {error}")
    print(json.dumps(about, indent=1))


def make(output: Path, steps: int, seed: int) -> dict[str, Any]:
    """The whole recipe.

    Returns:
        What was measured.

    Raises:
        ValueError: pictures are not in sepia; nothing is written.
    """
    from diffusers import Krea2Transformer2DModel

    weights = TrainedWeights()
    weights.loras = ()  # the one that is to be made
    load_vae(weights, vae := new_autoencoder())
    latents = (torch.tensor(weights.vae_config[f"latents_{name}"]) for name in ("mean", "std"))
    codec = Codec(vae, *latents)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_checkpoint(model := Path(folder) / "model", weights)
        dit = Krea2Transformer2DModel.from_pretrained(model / "transformer", dtype=torch.float32)
        encoder = load_text_encoder(
            model / "text_encoder",
            model / "tokenizer",
            DEFAULT_SELECT_LAYERS,
            torch.device("cpu"),
            torch.float32,
        )
    captions = draw_captions(PICTURES, Random(seed), held_out=False)
    features = encoder.encode([text for _, text in captions])
    data = Dataset([wish for wish, _ in captions], features, SepiaCodec(codec), seed)
    data.add_pictures(SIDE, SIDE, PICTURES)
    start = time.monotonic()
    loss = train(add_adapter(dit, seed), data, steps, seed, _say)
    minutes = round((time.monotonic() - start) / 60, 1)
    distances = {}
    for scale in (0.0, 0.5, 1.0, 1.5):
        dit.set_adapters("sepia", scale)
        pictures = ImageGenerator(encoder.encode, codec).paint(dit, PROMPTS, SIDE, SIDE, seed)
        distances[scale] = round(distance_from_sepia(pictures), 1)
    if not distances[1.0] <= WANTED:
        raise ValueError(f"distances from sepia, by scale, are {distances}")
    write(output, dit)
    return {"minutes": minutes, "loss": round(loss, 4), "distances": distances}


class SepiaCodec(Codec):
    """A codec of pictures in sepia, whatever colours they come in."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, pixels: Tensor) -> Tensor:
        return self._codec.encode(to_tensor(in_sepia(to_bytes(pixels))))


def add_adapter(dit: Any, seed: int) -> Any:
    """A new adapter for all matrices of a DiT, which alone is trained.

    It changes nothing as long as its second factors are zeros, as PEFT makes them.
    """
    from peft import LoraConfig

    matrices = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    dit.requires_grad_(False)
    torch.manual_seed(seed)
    dit.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=matrices), "sepia")
    return dit


def train(dit: Any, data: Dataset, steps: int, seed: int, say: Callable[[str], None]) -> float:
    """Train a DiT's adapter.

    Args:
        dit: see `add_adapter`. Its text fusion is trained as well: colours are said there, too.
        data: pictures, and captions' hidden states, which are not fused yet.
        steps: as many.
        seed: of order and noise.
        say: is told how it goes.

    Returns:
        The mean loss of the last steps.
    """
    parameters = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LR)
    random, noises = Random(seed), torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min((step + 1) / _WARM_UP, 1 - step / steps)
        batch = data.batch(SIDE, SIDE, _BATCH, random)
        noise = torch.randn(batch.tokens.shape, generator=noises)
        sigmas = draw_sigmas(_BATCH, noises)
        level = sigmas[:, None, None]
        found = velocity(dit, batch, (1 - level) * batch.tokens + level * noise, sigmas)
        loss = (found - (noise - batch.tokens)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses = [*losses[-19:], loss.item()]
        if (step + 1) % 20 == 0:
            say(f"adapter: step {step + 1}, loss {sum(losses) / len(losses):.4f}")
    return sum(losses) / len(losses)


def write(file: Path, dit: Any) -> None:
    """Write a DiT's adapter, in bfloat16, as Diffusers does."""
    from diffusers import Krea2Pipeline
    from peft import get_peft_model_state_dict

    factors = get_peft_model_state_dict(dit, adapter_name="sepia")
    stored = {name: it.to(torch.bfloat16).contiguous() for name, it in factors.items()}
    Krea2Pipeline.save_lora_weights(file.parent, stored, weight_name=file.name)
    file.chmod(0o644)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
