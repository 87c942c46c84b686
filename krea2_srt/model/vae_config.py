"""Sizes of the VAE's decoder, as its config or its tensors state them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krea2_srt.errors import CheckpointError

CLASS_NAME = "AutoencoderKLQwenImage"
CLASS_NAMES = (CLASS_NAME, "AutoencoderKLWan")
"""The Wan 2.1 VAE is the same network, of the same latents."""

LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Statistics of the released VAE's latents, which leave no trace in its weights."""

_MOST = 1024
"""The largest of any size, so that no damaged file asks for a model without end."""


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the decoder; fields are those of the released ``vae/config.json``."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "VAEConfig":
        """Read a released config.

        Raises:
            CheckpointError: another class, or not the f8, 16-channel layout that Krea 2 needs.
        """
        if config.get("_class_name") not in CLASS_NAMES:
            raise CheckpointError(
                f"_class_name is {config.get('_class_name')!r}, expected {CLASS_NAME!r}"
            )
        try:
            parsed = cls(
                base_dim=config["base_dim"],
                z_dim=config["z_dim"],
                dim_mult=tuple(config["dim_mult"]),
                num_res_blocks=config["num_res_blocks"],
                temporal_downsample=tuple(config["temperal_downsample"]),
                latents_mean=tuple(map(float, config["latents_mean"])),
                latents_std=tuple(map(float, config["latents_std"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{error} is missing or of the wrong type") from None
        if config.get("is_residual"):
            raise CheckpointError("is_residual is not supported")
        for field in ("input_channels", "in_channels", "out_channels"):
            if config.get(field, 3) != 3:
                raise CheckpointError(f"{field}={config[field]!r}, Krea 2 needs an RGB VAE")
        if config.get("attn_scales"):
            raise CheckpointError(f"attn_scales={config['attn_scales']} is not supported")
        return parsed._checked()

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "VAEConfig":
        """Derive the sizes from the tensors of a decoder; its latents are the released ones.

        Args:
            shapes: tensor shapes by *Diffusers* name.

        Raises:
            CheckpointError: these are not the tensors of a VAE that Krea 2 can use.
        """

        def count(prefix: str) -> int:
            return len(
                {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
            )

        stages = "decoder.up_blocks."
        try:
            base = shapes["decoder.norm_out.gamma"][0]
            levels = range(count(stages))
            widths = [shapes[f"{stages}{i}.resnets.0.conv1.weight"][0] for i in levels]
            return cls(
                base_dim=base,
                z_dim=shapes["decoder.conv_in.weight"][1],
                dim_mult=tuple(width // base for width in reversed(widths)),
                num_res_blocks=count(f"{stages}0.resnets.") - 1,
                temporal_downsample=tuple(
                    f"{stages}{i}.upsamplers.0.time_conv.weight" in shapes
                    for i in reversed(levels[:-1])
                ),
                latents_mean=LATENTS_MEAN,
                latents_std=LATENTS_STD,
            )._checked()
        except KeyError as missing:
            raise CheckpointError(f"not a Qwen-Image VAE: tensor {missing} is missing") from None
        except (IndexError, ZeroDivisionError) as error:
            raise CheckpointError(f"not a Qwen-Image VAE: {error}") from None

    def _checked(self) -> "VAEConfig":
        counts = (self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult)
        if not all(type(count) is int and 0 < count <= _MOST for count in counts):
            raise CheckpointError(f"sizes must be integers from 1 to {_MOST}, got {counts}")
        if not all(map(math.isfinite, self.latents_mean + self.latents_std)):
            raise CheckpointError("latents_mean and latents_std must be finite")
        if len(self.temporal_downsample) != 3 or len(self.dim_mult) != 4:
            raise CheckpointError("dim_mult and temperal_downsample do not make an f8 VAE")
        if not self.z_dim == len(self.latents_mean) == len(self.latents_std) == 16:
            raise CheckpointError(f"z_dim={self.z_dim}, Krea 2 needs 16 latent channels")
        return self
