"""Checkpoints in 8 bits: the numbers that a start would have made itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krea2_srt.convert.convert import convert_to_file, convert_to_folder
from krea2_srt.errors import CheckpointError
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import diffusers_name, load_dit
from krea2_srt.model.quantization import SERVED, QuantizedLinear
from tests import dialects
from tests.comparisons import CPU, relative_error

FP8 = SERVED["fp8"]
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


def test_values_and_scales_are_those_that_a_start_makes(checkpoint, fp8_folder):
    written = written_tensors(fp8_folder)
    dit = load_dit(checkpoint.transformer, CPU, torch.bfloat16, FP8)
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
        assert json.loads(bytes(marker.tolist())) == {"format": "float8_e4m3fn"}
    assert quantised == 8 * 4 == fp8_folder.tensors["quantised"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["fp8_folder", "fp8_file"])
def test_what_is_served_is_the_same_to_the_last_bit(checkpoint, form, dtype, request):
    out = request.getfixturevalue(form).out
    expected = load_dit(checkpoint.transformer, CPU, dtype, FP8).state_dict()
    served = load_dit(out / "transformer" if out.is_dir() else out, CPU, dtype, FP8).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(bytes_of(served[name]), bytes_of(tensor)), name


def test_8_bits_are_taken_over_as_they_are(checkpoint, fp8_folder, fp8_file, tmp_path):
    again = convert_to_file(
        fp8_folder.out / "transformer", checkpoint.sampling, tmp_path / "again.safetensors", FP8
    )
    assert again.tensors == {"kept": 86, "taken as they are": 32}
    assert again.losses == ()
    assert again.out.read_bytes() == fp8_file.out.read_bytes()


def test_8_bits_become_bfloat16(checkpoint, fp8_file, tmp_path):
    plain = convert_to_file(fp8_file.out, checkpoint.sampling, tmp_path / "plain.safetensors")
    assert plain.tensors == {"kept": 86, "dequantised to bfloat16": 32}
    assert 0 < max(loss.worst for loss in plain.losses) < 2**-8
    written, rounded = load_file(fp8_file.out), load_file(plain.out)
    name = "blocks.0.attn.wq.weight"
    exact = written[name].float() * written[name.replace(".weight", ".weight_scale")]
    assert torch.equal(rounded[name], exact.bfloat16())


def test_all_else_stays_as_it_is(source, fp8_folder):
    written = written_tensors(fp8_folder)
    others = {n: t for n, t in written.items() if t.dtype != torch.float8_e4m3fn}
    others = {n: t for n, t in others.items() if not n.endswith(SUFFIXES)}
    assert len(others) == fp8_folder.tensors["kept"] == 86
    for name, tensor in others.items():
        assert tensor.dtype == source[name].dtype, name
        assert torch.equal(tensor, source[name]), name
    assert written.keys() - others.keys() >= source.keys() - others.keys()


def test_the_index_names_every_tensor(fp8_folder):
    folder = fp8_folder.out / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        named = {name for name, where in index["weight_map"].items() if where == file.name}
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == named
            # A matrix is read with its scales, so they lie together.
            for name in named:
                assert not name.endswith(SUFFIXES) or f"{name.rpartition('.')[0]}.weight" in named
    tensors = written_tensors(fp8_folder).values()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)


def test_a_file_has_the_same_by_the_original_names(fp8_folder, fp8_file):
    folder, file = written_tensors(fp8_folder), load_file(fp8_file.out)
    assert len(file) == len(folder)
    for name, tensor in file.items():
        stem, _, suffix = name.rpartition(".")
        theirs = diffusers_name(name)
        if f".{suffix}" in SUFFIXES:
            theirs = diffusers_name(f"{stem}.weight").removesuffix("weight") + suffix
        assert torch.equal(
            tensor.flatten().view(torch.uint8), folder[theirs].flatten().view(torch.uint8)
        )


def test_the_errors_are_those_of_the_numbers(source, fp8_folder):
    written = written_tensors(fp8_folder)
    errors = {
        name: relative_error(tensor.float() * written[f"{name}_scale"], source[name].float())
        for name, tensor in written.items()
        if tensor.dtype == torch.float8_e4m3fn
    }
    assert len(fp8_folder.losses) == 8
    for loss in fp8_folder.losses:
        kind = {name: error for name, error in errors.items() if f".{loss.kind}.weight" in name}
        assert len(kind) == 4
        assert loss.mean == pytest.approx(sum(kind.values()) / 4, rel=1e-6)
        assert loss.name == max(kind, key=lambda name: kind[name])
        assert loss.worst == pytest.approx(kind[loss.name], rel=1e-6)


def test_it_is_smaller(source, fp8_folder):
    matrices = [t for n, t in written_tensors(fp8_folder).items() if t.element_size() == 1]
    saved = sum(t.numel() for t in matrices if t.dtype == torch.float8_e4m3fn)
    assert fp8_folder.bytes_before - fp8_folder.bytes_after > 0.9 * saved


def test_diffusers_refuses_8_bits_by_name(fp8_folder):
    """It would pass over the scales, and generate noise."""
    from diffusers import Krea2Transformer2DModel

    with pytest.raises(ValueError, match="krea2_srt"):
        Krea2Transformer2DModel.from_pretrained(fp8_folder.out / "transformer")


def test_a_folder_in_bfloat16_again_is_no_quantised_one(checkpoint, fp8_folder, tmp_path):
    convert_to_folder(Krea2Checkpoint.from_folder(fp8_folder.out), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "transformer" / "config.json").read_text())
    assert config == json.loads((checkpoint.transformer / "config.json").read_text())


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_is_named(checkpoint, source, what, tmp_path):
    name = "transformer_blocks.3.ff.down.weight"
    spoilt = source[name].clone()
    spoilt[-1, -1] = what
    save_file(source | {name: spoilt}, tmp_path / "turbo.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=rf"{name}: non-finite values"):
        convert_to_file(tmp_path / "turbo.safetensors", checkpoint.sampling, out, FP8)
    assert [path.name for path in tmp_path.iterdir()] == ["turbo.safetensors"]


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (dialects.write_plain, {"dtype": torch.float16}),
        (dialects.write_plain, {"dtype": torch.float8_e4m3fn}),
        (dialects.write_fp8_scaled, {}),
        (dialects.write_fp8_scaled, {"per_row": True} | BLOCKS),
        (dialects.write_int8, BLOCKS),
        (dialects.write_gguf, {}),
    ],
)
@pytest.mark.parametrize("quantization", [None, FP8])
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
