"""The released layout: a folder that Diffusers and SGLang read too."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from krea2_srt.convert.conversion import DIFFUSERS, Conversion, conversions
from krea2_srt.convert.plan import Plan, Shard, shards
from krea2_srt.convert.single_parts import text_encoder_part, vae_part
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import StoredDiT
from krea2_srt.model.json_files import read_json
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.released import model_index, scheduler_config, transformer_config
from krea2_srt.model.releases import WEIGHTS
from krea2_srt.model.text_encoder import check_text_encoder
from krea2_srt.model.vae_files import check_vae
from krea2_srt.model.weights import checkpoint_files

SHARD_BYTES = 5 * 10**9

INDEX = "model_index.json"
QUANTIZATION = "quantization_config"
"""In ``transformer/config.json``: Diffusers refuses what it does not know there, and would load
8 bits without their scales otherwise.
"""

_SINGLE = {"text_encoder": text_encoder_part, "vae": vae_part}
"""What makes a folder's part of a single file."""

_SMALL = {".json", ".txt", ".jinja", ".model"}
"""Endings of what a part has beside its weights: configs, vocabularies, chat templates."""

_SCHEDULER = "scheduler_config.json"


def folder_plan(
    checkpoint: Krea2Checkpoint,
    stored: StoredDiT,
    quantization: Quantization | None,
    stack: ExitStack,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """All files of a folder in the released layout.

    Args:
        checkpoint: what is converted.
        stored: its DiT.
        quantization: of the DiT.
        stack: has single files of other parts open until they are written.
        shard_bytes: size of a weight file, at most.

    Raises:
        CheckpointError: a part cannot be read, or lacks something that the layout has.
    """
    source = checkpoint.transformer.parent if checkpoint.transformer.is_dir() else None
    if source is not None and not (source / INDEX).is_file():
        source = None
    texts = {
        INDEX: _index(checkpoint, source),
        "transformer/config.json": _transformer_config(checkpoint, stored, quantization),
    }
    files = _shards("transformer", conversions(stored, quantization, DIFFUSERS), shard_bytes, texts)
    copies: dict[str, Path] = {}
    left: list[str] = []
    for part in ("text_encoder", "tokenizer", "vae"):
        path: Path = getattr(checkpoint, part)
        if part in _SINGLE and path.is_file():
            single = _SINGLE[part](path, stack)
            texts[f"{part}/config.json"] = _json(single.config)
            files += _shards(part, single.conversions, shard_bytes, texts)
            left += single.left_behind
        else:
            copies |= {f"{part}/{file.name}": file for file in _files(path, WEIGHTS.get(part))}
    # What no loader would take is told now, and not when a fleet has it.
    check_text_encoder(checkpoint.text_encoder, checkpoint.select_layers)
    check_vae(checkpoint.vae)
    if source is not None and (source / "scheduler" / _SCHEDULER).is_file():
        copies[f"scheduler/{_SCHEDULER}"] = source / "scheduler" / _SCHEDULER
    else:
        texts[f"scheduler/{_SCHEDULER}"] = _json(scheduler_config(checkpoint.sampling.shift))
    if source is not None:
        left += _left_behind(source, copies)
    return Plan("transformer", tuple(files), texts, copies, tuple(left))


def _shards(
    part: str, written: Sequence[Conversion], shard_bytes: int, texts: dict[str, str]
) -> list[Shard]:
    """Weight files of a part; where there are several, their index goes to ``texts``."""
    groups = shards(written, shard_bytes)
    stem, count = WEIGHTS[part], len(groups)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}" for i in range(count)] if count > 1 else [stem]
    files = [
        Shard(f"{part}/{name}.safetensors", tuple(group), {"format": "pt"})
        for name, group in zip(names, groups, strict=True)
    ]
    if count > 1:
        texts[f"{part}/{stem}.safetensors.index.json"] = _json(_weight_map(files))
    return files


def _weight_map(files: Sequence[Shard]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in files)},
        "weight_map": {
            header.name: shard.name.rpartition("/")[2]
            for shard in files
            for header in shard.headers
        },
    }


def _index(checkpoint: Krea2Checkpoint, source: Path | None) -> str:
    """What the input says, with the recipe that was asked for."""
    index = model_index(checkpoint.sampling, checkpoint.select_layers)
    if source is not None:
        index |= read_json(source / INDEX)
    return _json(index | {"is_distilled": checkpoint.sampling.distilled})


def _transformer_config(
    checkpoint: Krea2Checkpoint, stored: StoredDiT, quantization: Quantization | None
) -> str:
    if checkpoint.transformer.is_dir():
        config: dict[str, Any] = read_json(checkpoint.transformer / "config.json")
    else:
        config = transformer_config(stored.config)
    if "is_distilled" in config:
        config["is_distilled"] = checkpoint.sampling.distilled
    config.pop(QUANTIZATION, None)
    if quantization is not None:
        config[QUANTIZATION] = {"quant_method": "krea2_srt", "format": quantization.format}
    return _json(config)


def _files(folder: Path, stem: str | None) -> Iterator[Path]:
    """What belongs to a part. It may lie in a repo among other things."""
    weights = checkpoint_files(folder, stem) if stem is not None else []
    yield from weights
    for file in sorted(folder.iterdir()):
        # Without its weights, an index of them is none of a tokenizer's.
        index_of_others = not weights and file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _SMALL and not index_of_others:
            yield file


def _left_behind(source: Path, copies: Mapping[str, Path]) -> Iterator[str]:
    """What the output has not, of a folder in the released layout."""
    parts = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
    for entry in sorted(source.iterdir()):
        if entry.name in parts[1:] and entry.is_dir():
            copied = {copies[name].name for name in copies if name.startswith(f"{entry.name}/")}
            yield from (
                f"{entry.name}/{inner.name}"
                for inner in sorted(entry.iterdir())
                if inner.name not in copied
            )
        elif entry.name not in (INDEX, parts[0]):
            yield entry.name


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
