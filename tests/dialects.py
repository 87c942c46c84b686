"""Writes state dicts in the formats that checkpoint files come in.

Every writer takes a state dict, writes a file and returns what the file means: float32 tensors by
the same names, computed here from the formats' definitions and never with the code under test.

To write a file that is wrong in one part, give ``spoil``: it may change the tensors (and, of a
safetensors file, the metadata under the key `METADATA`) just before they are written.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

METADATA = "__metadata__"
"""Where ``spoil`` finds the header's metadata, str to str, among the tensors."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GROUP = 256

Spoil = Callable[[dict[str, Any]], object]
Chooses = Callable[[str, Tensor], bool]


def all_matrices(name: str, tensor: Tensor) -> bool:
    """What writers quantise unless they are told: every weight with two dimensions."""
    return name.endswith(".weight") and tensor.dim() == 2


def write_plain(
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    spoil: Spoil | None = None,
) -> dict[str, Tensor]:
    """Cast all tensors to one dtype: bf16, f16, f32, or e4m3 and e5m2 without scales."""
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _save(stored, file, dict(metadata or {}), spoil)
    return {name: tensor.float() for name, tensor in stored.items()}


def write_fp8_scaled(
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    dtype: torch.dtype = E4M3,
    per_row: bool = False,
    flat: bool = False,
    spelling: str = "weight_scale",
    marker: str = "comfy_quant",
    input_scale: bool = False,
    full_precision: bool = False,
    chooses: Chooses = all_matrices,
    rest: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    spoil: Spoil | None = None,
) -> dict[str, Tensor]:
    """ComfyUI's ``fp8_scaled``.

    Args:
        per_row: a scale for each row rather than for the whole matrix.
        flat: scales of rows have the shape [out] rather than [out, 1].
        spelling: ``weight_scale`` or ``scale_weight``; the activation's scale follows it.
        marker: ``comfy_quant`` (a tensor for each matrix), ``metadata`` (JSON in the header),
            ``scaled_fp8`` (one tensor for the file) or ``none``.
        input_scale: whether there is a scale of the activations.
        full_precision: whether markers ask for products in full precision.
        chooses: which tensors are quantised.
        rest: dtype of all others.
    """
    largest = torch.finfo(dtype).max
    inputs = {"weight_scale": "input_scale", "scale_weight": "scale_input"}[spelling]
    description: dict[str, object] = {"format": str(dtype).removeprefix("torch.")}
    if full_precision:
        description["full_precision_matrix_mult"] = True
    stored: dict[str, Any] = {}
    meant: dict[str, Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        if not chooses(name, tensor):
            stored[name] = tensor.to(rest)
            meant[name] = stored[name].float()
            continue
        stem = name.removesuffix(".weight")
        rows = tensor.float().flatten(1).abs().amax(1) if per_row else tensor.float().abs().max()
        scale = rows.clamp(min=1e-12) / largest
        wide = scale.reshape(-1, *[1] * (tensor.dim() - 1)) if per_row else scale
        values = (tensor.float() / wide).clamp(-largest, largest).to(dtype)
        stored[name] = values
        stored[f"{stem}.{spelling}"] = scale if flat or not per_row else scale[:, None]
        if input_scale:
            stored[f"{stem}.{inputs}"] = torch.tensor(0.5)
        described[stem] = description
        meant[name] = values.float() * wide
    if marker == "scaled_fp8":
        stored["scaled_fp8"] = torch.empty(2 if full_precision else 0, dtype=dtype)
    found = dict(metadata or {})
    _mark(stored, found, described, marker)
    _save(stored, file, found, spoil)
    return meant


def write_int8(
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    group: int | Callable[[str], int] = GROUP,
    per_row: bool = True,
    flat: bool = False,
    marker: str = "comfy_quant",
    chooses: Chooses = all_matrices,
    rest: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    spoil: Spoil | None = None,
) -> dict[str, Tensor]:
    """ComfyUI's ``int8_convrot``, or its int8 without a rotation.

    Args:
        group: columns that are rotated together, of all matrices or by name; 0 for no rotation. A
            matrix whose width is no multiple of it is stored without one.
        per_row, flat, chooses, rest: see `write_fp8_scaled`.
        marker: ``comfy_quant``, ``metadata``, ``both`` or ``none``.
    """
    stored: dict[str, Any] = {}
    meant: dict[str, Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        if not chooses(name, tensor):
            stored[name] = tensor.to(rest)
            meant[name] = stored[name].float()
            continue
        stem = name.removesuffix(".weight")
        size = group(stem) if callable(group) else group
        description: dict[str, object] = {"format": "int8_tensorwise"}
        weight = tensor.float()
        if size and weight.shape[1] % size == 0:
            description |= {"convrot": True, "convrot_groupsize": size}
            weight = rotated(weight, size)
        else:
            size = 0
        rows = weight.abs().amax(1) if per_row else weight.abs().max()
        scale = rows.clamp(min=1e-12) / 127
        wide = scale[:, None] if per_row else scale
        values = (weight / wide).round().clamp(-127, 127).to(torch.int8)
        stored[name] = values
        stored[f"{stem}.weight_scale"] = scale if flat or not per_row else scale[:, None]
        described[stem] = description
        means = values.float() * wide
        meant[name] = rotated(means, size) if size else means
    found = dict(metadata or {})
    _mark(stored, found, described, marker)
    _save(stored, file, found, spoil)
    return meant


def rotated(x: Tensor, group: int) -> Tensor:
    """The regular Hadamard rotation of each ``group`` columns, which is its own inverse.

    As SGLang's kernel has it (``csrc/gemm/convrot_int8``): a 4-point stage for each base-4 digit
    of a column's number in its group, ``y[d] = S - 2 x[3 - d]`` with S the sum of the four columns
    that differ in that digit only; in the end all is divided by sqrt(group).
    """
    digits = group.bit_length() // 2
    assert 4**digits == group
    parts = x.float().reshape(-1, *[4] * digits)
    for axis in range(1, digits + 1):
        parts = parts.sum(axis, keepdim=True) - 2 * parts.flip(axis)
    return parts.reshape(x.shape) / group**0.5


def write_gguf(
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    kind: str = "Q8_0",
    chooses: Chooses = all_matrices,
    architecture: str = "krea2",
    metadata: Mapping[str, str] | None = None,
    spoil: Spoil | None = None,
) -> dict[str, Tensor]:
    """GGUF, as ComfyUI-GGUF writes it: names and shapes are those of the safetensors file.

    Args:
        kind: one of gguf's types that gguf can write, such as ``Q8_0``, ``F16``, ``BF16`` or
            ``Q4_0``; what it cannot hold, and what is not chosen, is F32.
        chooses: which tensors are of that type.
        architecture: what the file calls its model.
        metadata: further text fields.
    """
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[type_]
    chosen = dict(tensors)
    if spoil is not None:
        spoil(chosen)
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    meant: dict[str, Tensor] = {}
    for name, tensor in chosen.items():
        array = tensor.float().contiguous().numpy()
        of = gguf.GGMLQuantizationType.F32
        if chooses(name, tensor) and tensor.shape[-1] % block == 0:
            of = type_
        data = gguf.quants.quantize(array, of)
        writer.add_tensor(name, data, raw_dtype=of)
        meant[name] = torch.tensor(gguf.quants.dequantize(data, of)).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same with a prefix before all names, such as ``model.diffusion_model.``."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def marker_tensor(description: object) -> Tensor:
    """A ``comfy_quant`` tensor: the bytes of its JSON."""
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def _mark(
    stored: dict[str, Any],
    metadata: dict[str, str],
    described: Mapping[str, Mapping[str, object]],
    marker: str,
) -> None:
    if marker in ("comfy_quant", "both"):
        stored |= {f"{stem}.comfy_quant": marker_tensor(d) for stem, d in described.items()}
    if marker in ("metadata", "both"):
        metadata["_quantization_metadata"] = json.dumps({"layers": described})


def _save(
    stored: dict[str, Any], file: Path, metadata: dict[str, str], spoil: Spoil | None
) -> None:
    if spoil is not None:
        stored[METADATA] = metadata
        spoil(stored)
        metadata = stored.pop(METADATA)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file, metadata)
