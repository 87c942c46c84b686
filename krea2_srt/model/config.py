"""Sizes of a Krea 2 DiT, as its checkpoint states them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krea2_srt.errors import CheckpointError

CLASS_NAME = "Krea2Transformer2DModel"


@dataclass(frozen=True)
class Krea2Config:
    """Architecture of the DiT; fields and defaults are those of the released ``config.json``."""

    in_channels: int = 64
    num_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    num_key_value_heads: int = 12
    intermediate_size: int = 16384
    timestep_embed_dim: int = 256
    text_hidden_dim: int = 2560
    num_text_layers: int = 12
    text_num_attention_heads: int = 20
    text_num_key_value_heads: int = 20
    text_intermediate_size: int = 6912
    num_layerwise_text_blocks: int = 2
    num_refiner_text_blocks: int = 2
    axes_dims_rope: tuple[int, int, int] = (32, 48, 48)
    rope_theta: float = 1000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "axes_dims_rope":
                fits = isinstance(value, tuple) and len(value) == 3
                if not fits or not all(_is_count(d) and d % 2 == 0 for d in value):
                    raise CheckpointError(
                        f"axes_dims_rope must be three positive even numbers, got {value!r}"
                    )
            elif field.type is float:
                if not _is_number(value) or not 0 < value < math.inf:
                    raise CheckpointError(f"{field.name} must be a positive number, got {value!r}")
            elif not _is_count(value):
                raise CheckpointError(f"{field.name} must be a positive integer, got {value!r}")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise CheckpointError(
                f"axes_dims_rope={self.axes_dims_rope} must add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )
        for heads, kv_heads in (
            ("num_attention_heads", "num_key_value_heads"),
            ("text_num_attention_heads", "text_num_key_value_heads"),
        ):
            if getattr(self, heads) % getattr(self, kv_heads):
                raise CheckpointError(
                    f"{heads}={getattr(self, heads)} must be a multiple of "
                    f"{kv_heads}={getattr(self, kv_heads)}"
                )
        if self.text_hidden_dim % self.text_num_attention_heads:
            raise CheckpointError(
                f"text_hidden_dim={self.text_hidden_dim} must be a multiple of "
                f"text_num_attention_heads={self.text_num_attention_heads}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def text_head_dim(self) -> int:
        """Head size of the text fusion blocks."""
        return self.text_hidden_dim // self.text_num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Krea2Config":
        """Read a released ``transformer/config.json``; names that are not ours are ignored.

        Raises:
            CheckpointError: the class name is another model's, or a size is impossible.
        """
        class_name = config.get("_class_name", CLASS_NAME)
        if class_name != CLASS_NAME:
            raise CheckpointError(f"_class_name is {class_name!r}, expected {CLASS_NAME!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in config.items() if k in known}
        if isinstance(values.get("axes_dims_rope"), list):
            values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
        return cls(**values)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Krea2Config":
        """Derive the sizes from a checkpoint that has no config (the original single file).

        rope_theta and norm_eps leave no trace in the weights; they are the released model's.

        Args:
            shapes: tensor shapes by *Diffusers* name.

        Raises:
            CheckpointError: these are not the tensors of a Krea 2 DiT.
        """

        def count(prefix: str) -> int:
            return len(
                {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
            )

        try:
            hidden, in_channels = shapes["img_in.weight"]
            block = "transformer_blocks.0."
            head_dim = shapes[block + "attn.norm_q.weight"][0]
            text = "text_fusion.layerwise_blocks.0."
            text_head_dim = shapes[text + "attn.norm_q.weight"][0]
            text_dim = shapes[text + "norm1.weight"][0]
            if head_dim % 16:
                raise CheckpointError(f"head size {head_dim} is not a multiple of 16")
            spatial = 6 * (head_dim // 16)
            return cls(
                in_channels=in_channels,
                num_layers=count("transformer_blocks."),
                attention_head_dim=head_dim,
                num_attention_heads=hidden // head_dim,
                num_key_value_heads=shapes[block + "attn.to_k.weight"][0] // head_dim,
                intermediate_size=shapes[block + "ff.gate.weight"][0],
                timestep_embed_dim=shapes["time_embed.linear_1.weight"][1],
                text_hidden_dim=text_dim,
                num_text_layers=shapes["text_fusion.projector.weight"][1],
                text_num_attention_heads=text_dim // text_head_dim,
                text_num_key_value_heads=shapes[text + "attn.to_k.weight"][0] // text_head_dim,
                text_intermediate_size=shapes[text + "ff.gate.weight"][0],
                num_layerwise_text_blocks=count("text_fusion.layerwise_blocks."),
                num_refiner_text_blocks=count("text_fusion.refiner_blocks."),
                axes_dims_rope=(head_dim - 2 * spatial, spatial, spatial),
            )
        except KeyError as missing:
            raise CheckpointError(f"not a Krea 2 checkpoint: tensor {missing} is missing") from None
        except (IndexError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"not a Krea 2 checkpoint: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
