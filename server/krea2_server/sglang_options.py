"""Those of SGLang's options that say how much memory an engine takes."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from krea2_srt.errors import ConfigError

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class SGLangOptions:
    """What SGLang's options say of memory.

    Attributes:
        quantization: by name; "" is none.
        keep: names of matrices that stay as they are.
        text_encoder: ``offload``, ``resident``, or "" where none says it.
        dtypes: of the DiT, the text encoder and the VAE, torch's names.
        context_cache_bytes: of prompts; None is the default.
        revision: of the checkpoint's repo.
        others: that are not understood here.
    """

    quantization: str
    keep: tuple[str, ...]
    text_encoder: str
    dtypes: tuple[str, str, str]
    context_cache_bytes: int | None
    revision: str | None
    others: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"sglang_args: {message}")


def parse_sglang_options(options: Sequence[str]) -> SGLangOptions:
    """Read them as SGLang's own parser does, which takes a minute to import.

    Raises:
        ConfigError: one has no value, or one that it cannot have.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--quantization-ignored-layers", nargs="+", default=[])
    parser.add_argument("--text-encoder-cpu-offload", nargs="?", const="true", default="")
    parser.add_argument("--dit-precision", choices=_PRECISIONS, default="bf16")
    parser.add_argument(
        "--text-encoder-precisions", nargs="+", choices=_PRECISIONS, default=["bf16"]
    )
    parser.add_argument("--vae-precision", choices=_PRECISIONS, default="bf16")
    parser.add_argument("--vae-decode-precision", choices=_PRECISIONS)
    parser.add_argument("--conditioning-cache-max-size-mb", type=float)
    parser.add_argument("--disable-conditioning-cache", action="store_true")
    parser.add_argument("--revision")
    found, others = parser.parse_known_args(options)
    cache = found.conditioning_cache_max_size_mb
    offload = found.text_encoder_cpu_offload.lower()
    dtypes = (
        found.dit_precision,
        found.text_encoder_precisions[0],
        found.vae_decode_precision or found.vae_precision,
    )
    dit, text, vae = (_PRECISIONS[dtype] for dtype in dtypes)
    return SGLangOptions(
        found.quantization,
        tuple(found.quantization_ignored_layers),
        {"": "", "true": "offload"}.get(offload, "resident"),
        (dit, text, vae),
        0 if found.disable_conditioning_cache else None if cache is None else int(cache * 2**20),
        found.revision,
        tuple(option for option in others if option.startswith("-")),
    )
