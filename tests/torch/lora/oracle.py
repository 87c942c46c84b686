"""One step of one image, by Diffusers' transformer with PEFT's adapter and by ours."""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from krea2_srt.lora.beside import PackDeltas, UniformDeltas
from krea2_srt.lora.placed import NO_ADAPTERS, AdapterSet
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.pack import Segments
from krea2_srt.runner.packing import build_pack
from krea2_srt.runner.sequence_shape import SequenceShape
from tests.comparisons import CPU
from tests.torch.lora.forms import Pairs, random_pair

TEXT, ROWS, COLUMNS = 7, 6, 10


@dataclass(frozen=True)
class Inputs:
    """Noisy tokens, a prompt's hidden states, and the time."""

    tokens: Tensor
    hidden_states: Tensor
    timestep: Tensor

    @torch.inference_mode()
    def diffusers(self, pipeline, transformer: nn.Module | None = None) -> Tensor:
        """Velocity [tokens, channels] of a pipeline's transformer, or of a copy of that."""
        return (transformer or pipeline.transformer)(
            hidden_states=self.tokens[None],
            encoder_hidden_states=self.hidden_states[None],
            timestep=self.timestep,
            position_ids=pipeline.prepare_position_ids(TEXT, ROWS, COLUMNS, CPU),
            return_dict=False,
        )[0][0]

    @torch.inference_mode()
    def ours(self, dit: Krea2DiT, adapters: AdapterSet = NO_ADAPTERS) -> Tensor:
        """The same of ours, with adapters beside it."""
        pack = build_pack([SequenceShape(TEXT, ROWS, COLUMNS)], dit.config, CPU)
        deltas = UniformDeltas.of(adapters)
        context = dit.fuse_text(self.hidden_states, Segments.of([TEXT], CPU), deltas=deltas)
        velocity = dit(
            pack.place(pack.image_spans, [self.tokens]),
            pack.place(pack.text_spans, [context]),
            pack,
            dit.modulation(self.timestep, deltas),
            deltas=PackDeltas.of(pack.segments.spans, [adapters]),
        )
        ((start, end),) = pack.image_spans
        return velocity[start:end]


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(ROWS * COLUMNS, 64, generator=generator)
    hidden_states = 3 * torch.randn(TEXT, 12, 64, generator=generator)
    return Inputs(tokens, hidden_states, torch.tensor([0.7371]))


def with_adapter(transformer: nn.Module, config: LoraConfig, seed: int = 3) -> nn.Module:
    """A copy of Diffusers' transformer with PEFT's adapter ``some`` of random factors."""
    copied = copy.deepcopy(transformer)
    copied.add_adapter(config, "some")
    generator = torch.Generator().manual_seed(seed)
    for layer in copied.modules():
        if isinstance(layer, LoraLayer):
            down, up = layer.lora_A["some"].weight.data, layer.lora_B["some"].weight.data
            pair = random_pair((len(up), down.shape[1]), len(down), 0, generator)
            down.copy_(pair.down)
            up.copy_(pair.up)
    return copied


def with_pairs(transformer: nn.Module, pairs: Pairs) -> nn.Module:
    """A copy of Diffusers' transformer with PEFT's adapter of these factors."""
    config = LoraConfig(
        target_modules=list(pairs),
        rank_pattern={f"^{name}": len(pair.down) for name, pair in pairs.items()},
        alpha_pattern={f"^{name}": pair.alpha for name, pair in pairs.items()},
    )
    copied = with_adapter(transformer, config)
    for name, pair in pairs.items():
        layer = copied.get_submodule(name)
        layer.lora_A["some"].weight.data.copy_(pair.down)
        layer.lora_B["some"].weight.data.copy_(pair.up)
    return copied
