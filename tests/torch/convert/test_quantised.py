"""Checkpoints in 8 bits: the numbers that a start would have made itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krea2_srt.convert.convert import convert_to_file, convert_to_folder
from krea2_srt.errors import CheckpointError, ConfigError
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import diffusers_name, load_dit
from krea2_srt.model.quantization import DTYPES, SERVED, Quantization, QuantizedLinear
from tests import dialects
from tests.comparisons import CPU, relative_error

FP8, INT8 = SERVED["fp8"], SERVED["int8"]
MARKERS = {
    "fp8": {"format": "float8_e4m3fn"},
    "int8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
}
"""What ComfyUI reads."""

SUFFIXES = (".weight_scale", ".comfy_quant")


def of_a_block(name: str, tensor: torch.Tensor) -> bool:
    """What Comfy-Org's files have in 8 bits."""
    return name.startswith("transformer_blocks.") and dialects.all_matrices(name, tensor)


BLOCKS = {"chooses": of_a_block}


@pytest.fixture(scope="module")
def source(demo_model: Path) -> dict[str, torch.Tensor]:
    return load_file(demo_model / "transformer" / "diffusion_pytorch_model.safetensors")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def written_tensors(converted) -> dict[str, torch.Tensor]:
    """All tensors of a folder's DiT, by name."""
    files = sorted((converted.out / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_values_and_scales_are_those_that_a_start_makes(checkpoint, eight_bits, eight_bit_folder):
    written = written_tensors(eight_bit_folder)
    dit = load_dit(checkpoint.transformer, CPU, torch.bfloat16, eight_bits)
    scales = {id(m.weight): m.scale for m in dit.modules() if isinstance(m, QuantizedLinear)}
    quantised = 0
    for name, slot in dit.weight_map().items():
        if slot.eight_bit is None:
            continue
        quantised += 1
        scale = scales[id(slot.rows_of)][slot.start : slot.start + len(slot.view)]
        assert torch.equal(bytes_of(written[name]), bytes_of(slot.view)), name
        assert torch.equal(written[name.replace(".weight", ".weight_scale")], scale), name
        marker = written[name.replace(".weight", ".comfy_quant")]
        assert json.loads(bytes(marker.tolist())) == MARKERS[eight_bits.format]
    assert quantised == 8 * 4 == eight_bit_folder.tensors["quantised"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_served_is_the_same_to_the_last_bit(
    checkpoint, eight_bits, eight_bit_folder, eight_bit_file, dtype
):
    expected = load_dit(checkpoint.transformer, CPU, dtype, eight_bits).state_dict()
    for path in (eight_bit_folder.out / "transformer", eight_bit_file.out):
        served = load_dit(path, CPU, dtype, eight_bits).state_dict()
        for name, tensor in expected.items():
            assert torch.equal(bytes_of(served[name]), bytes_of(tensor)), name


def test_8_bits_are_taken_over_as_they_are(
    checkpoint, eight_bits, eight_bit_folder, eight_bit_file, tmp_path
):
    folder, out = eight_bit_folder.out / "transformer", tmp_path / "again.safetensors"
    again = convert_to_file(folder, checkpoint.sampling, out, eight_bits)
    assert again.tensors == {"kept": 86, "taken as they are": 32}
    assert again.losses == ()
    assert again.out.read_bytes() == eight_bit_file.out.read_bytes()


@pytest.mark.parametrize(
    ("group", "marker"),
    [
        (64, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}),
        (0, {"format": "int8_tensorwise"}),
    ],
)
def test_int8_keeps_the_rotation_of_its_file(source, checkpoint, group, marker, tmp_path):
    """Matrix by matrix; what is not in int8 yet gets 256."""
    file, attention = tmp_path / "some.safetensors", lambda n, t: of_a_block(n, t) and "attn" in n
    dialects.write_int8(source, file, group=group, chooses=attention)
    out = convert_to_file(file, checkpoint.sampling, tmp_path / "out.safetensors", INT8)
    assert out.tensors == {"kept": 86, "taken as they are": 20, "quantised": 12}
    stored, written = load_file(file), load_file(out.out)
    taken = 0
    for name, tensor in written.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "comfy_quant":
            expected = marker if ".attn." in stem else MARKERS["int8"]
            assert json.loads(bytes(tensor.tolist())) == expected, name
        elif ".attn." in stem and f"{stem}.comfy_quant" in written:
            theirs = diffusers_name(f"{stem}.weight").removesuffix("weight")
            assert torch.equal(tensor, stored[theirs + suffix]), name
            taken += 1
    assert taken == 2 * 20
    served = load_dit(out.out, CPU, torch.bfloat16, INT8)
    formats = {n: m.format for n, m in served.named_modules() if isinstance(m, QuantizedLinear)}
    assert {format for n, format in formats.items() if ".attn." in n} == {
        TokenFormat(torch.int8, group)
    }
    assert {format for n, format in formats.items() if ".ff." in n} == {
        TokenFormat(torch.int8, 256)
    }


def test_what_no_file_has_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="quantization: no file has fp8 that is rotated"):
        convert_to_file(
            checkpoint.transformer,
            checkpoint.sampling,
            tmp_path / "x.safetensors",
            Quantization("fp8", rotation=True),
        )
    assert list(tmp_path.iterdir()) == []


def test_8_bits_become_bfloat16(checkpoint, eight_bits, eight_bit_file, tmp_path):
    plain = convert_to_file(eight_bit_file.out, checkpoint.sampling, tmp_path / "plain.safetensors")
    assert plain.tensors == {"kept": 86, "dequantised to bfloat16": 32}
    assert 0 < max(loss.worst for loss in plain.losses) < 2**-8
    written, rounded = load_file(eight_bit_file.out), load_file(plain.out)
    name = "blocks.0.attn.wq.weight"
    exact = written[name].float() * written[name.replace(".weight", ".weight_scale")]
    if eight_bits.rotation:
        exact = dialects.rotated(exact, 256)
    off = rounded[name] != exact.bfloat16()
    # Sums of a rotation in another order, at the edge of a step.
    assert off.float().mean() <= (1e-2 if eight_bits.rotation else 0)
    assert relative_error(rounded[name].float(), exact) < 2**-8


def test_all_else_stays_as_it_is(source, eight_bits, eight_bit_folder):
    written = written_tensors(eight_bit_folder)
    others = {n: t for n, t in written.items() if t.dtype != DTYPES[eight_bits.format]}
    others = {n: t for n, t in others.items() if not n.endswith(SUFFIXES)}
    assert len(others) == eight_bit_folder.tensors["kept"] == 86
    for name, tensor in others.items():
        assert tensor.dtype == source[name].dtype, name
        assert torch.equal(tensor, source[name]), name
    assert written.keys() - others.keys() >= source.keys() - others.keys()


def test_the_index_names_every_tensor(eight_bit_folder):
    folder = eight_bit_folder.out / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        named = {name for name, where in index["weight_map"].items() if where == file.name}
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == named
            # A matrix is read with its scales, so they lie together.
            for name in named:
                assert not name.endswith(SUFFIXES) or f"{name.rpartition('.')[0]}.weight" in named
    tensors = written_tensors(eight_bit_folder).values()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)


def test_a_file_has_the_same_by_the_original_names(eight_bit_folder, eight_bit_file):
    folder, file = written_tensors(eight_bit_folder), load_file(eight_bit_file.out)
    assert len(file) == len(folder)
    for name, tensor in file.items():
        stem, _, suffix = name.rpartition(".")
        theirs = diffusers_name(name)
        if f".{suffix}" in SUFFIXES:
            theirs = diffusers_name(f"{stem}.weight").removesuffix("weight") + suffix
        assert torch.equal(
            tensor.flatten().view(torch.uint8), folder[theirs].flatten().view(torch.uint8)
        )


def test_the_errors_are_those_of_the_numbers(source, eight_bits, eight_bit_folder):
    written = written_tensors(eight_bit_folder)
    errors = {}
    for name, tensor in written.items():
        if tensor.dtype == DTYPES[eight_bits.format]:
            means = tensor.float() * written[f"{name}_scale"]
            means = dialects.rotated(means, 256) if eight_bits.rotation else means
            errors[name] = relative_error(means, source[name].float())
    assert len(eight_bit_folder.losses) == 8
    for loss in eight_bit_folder.losses:
        kind = {name: error for name, error in errors.items() if f".{loss.kind}.weight" in name}
        assert len(kind) == 4
        assert loss.mean == pytest.approx(sum(kind.values()) / 4, rel=1e-5)
        assert loss.name == max(kind, key=lambda name: kind[name])
        assert loss.worst == pytest.approx(kind[loss.name], rel=1e-5)
        assert 0.02 < loss.mean < 0.03 if eight_bits is FP8 else 0.005 < loss.mean < 0.01


def test_it_is_smaller(eight_bits, eight_bit_folder):
    matrices = written_tensors(eight_bit_folder).values()
    saved = sum(t.numel() for t in matrices if t.dtype == DTYPES[eight_bits.format])
    assert eight_bit_folder.bytes_before - eight_bit_folder.bytes_after > 0.9 * saved


def test_the_folder_says_what_it_is(eight_bits, eight_bit_folder):
    config = json.loads((eight_bit_folder.out / "transformer" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "krea2_srt",
        "format": eight_bits.format,
    }


def test_diffusers_refuses_8_bits_by_name(eight_bit_folder):
    """It would pass over the scales, and generate noise."""
    from diffusers import Krea2Transformer2DModel

    with pytest.raises(ValueError, match="krea2_srt"):
        Krea2Transformer2DModel.from_pretrained(eight_bit_folder.out / "transformer")


def test_a_folder_in_bfloat16_again_is_no_quantised_one(checkpoint, eight_bit_folder, tmp_path):
    convert_to_folder(Krea2Checkpoint.from_folder(eight_bit_folder.out), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "transformer" / "config.json").read_text())
    assert config == json.loads((checkpoint.transformer / "config.json").read_text())


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", [FP8, INT8])
def test_what_is_no_number_is_named(checkpoint, source, what, quantization, tmp_path):
    name = "transformer_blocks.3.ff.down.weight"
    spoilt = source[name].clone()
    spoilt[-1, -1] = what
    save_file(source | {name: spoilt}, tmp_path / "turbo.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=rf"{name}: non-finite values"):
        convert_to_file(tmp_path / "turbo.safetensors", checkpoint.sampling, out, quantization)
    assert [path.name for path in tmp_path.iterdir()] == ["turbo.safetensors"]


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (dialects.write_plain, {"dtype": torch.float16}),
        (dialects.write_plain, {"dtype": torch.float8_e4m3fn}),
        (dialects.write_fp8_scaled, {}),
        (dialects.write_fp8_scaled, {"per_row": True} | BLOCKS),
        (dialects.write_int8, BLOCKS),
        (dialects.write_int8, {"group": lambda n: 64 if n.endswith(".to_q") else 16} | BLOCKS),
        (dialects.write_gguf, {}),
    ],
)
@pytest.mark.parametrize("quantization", [None, FP8, INT8])
def test_every_format_that_is_read_is_converted_as_it_is_loaded(
    source, write, options, quantization, tmp_path, checkpoint
):
    """With numbers in float32 rounded once, to bfloat16, where they are not 8 bits."""
    file = tmp_path / ("turbo.gguf" if write is dialects.write_gguf else "turbo.safetensors")
    meant = write(source, file, **options)
    out = tmp_path / "out.safetensors"
    convert_to_file(file, checkpoint.sampling, out, quantization)
    dtype = torch.bfloat16 if options.get("dtype") != torch.float16 else torch.float32
    expected = load_dit(file, CPU, dtype, quantization).state_dict()
    found = load_dit(out, CPU, dtype, quantization).state_dict()
    assert len(meant) == len(source)
    for name, tensor in expected.items():
        assert torch.equal(bytes_of(found[name]), bytes_of(tensor)), name
