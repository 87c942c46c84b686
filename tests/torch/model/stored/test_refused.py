"""Files that are refused: one line that names file and fault, before a weight is read."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.stored.files import open_files
from krea2_srt.model.stored.plain import PlainTensor
from tests.comparisons import CPU
from tests.dialects import (
    METADATA,
    marker_tensor,
    prefixed,
    write_fp8_scaled,
    write_gguf,
    write_int8,
    write_plain,
)
from tests.torch.model.stored.small import MATRIX, state_dict

KEY = f"{MATRIX}.weight"
SCALE, INPUT, MARKER = f"{MATRIX}.weight_scale", f"{MATRIX}.input_scale", f"{MATRIX}.comfy_quant"
HEADER = "_quantization_metadata"


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    """Only scales and markers."""
    read = PlainTensor.read

    def small(self):
        assert not self.key.endswith(".weight"), f"{self.key} is read"
        return read(self)

    monkeypatch.setattr(PlainTensor, "read", small)


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_dit(file, CPU, torch.float32)
    text = str(caught.value)
    assert text.isprintable(), text
    assert str(file) in text
    assert len(text) < 600
    return text.removeprefix("weight file ").removeprefix(str(file)).removeprefix(": ")


def header(change: Callable[[dict], object]):
    def spoil(tensors):
        said = json.loads(tensors[METADATA][HEADER])
        change(said["layers"])
        tensors[METADATA][HEADER] = json.dumps(said)

    return spoil


def marked(**said):
    return lambda t: t.update({MARKER: marker_tensor({"format": "float8_e4m3fn", **said})})


def marked_int8(**said):
    return lambda t: t.update({MARKER: marker_tensor({"format": "int8_tensorwise", **said})})


def scale(value, shape=(), dtype=torch.float32):
    return lambda t: t.update({SCALE: torch.full(shape, value, dtype=dtype)})


WRONG_FP8 = {
    "no scale": (lambda t: t.pop(SCALE), f"{KEY} is stored as F8_E4M3 and has no scale"),
    "no weight": (lambda t: t.pop(KEY), "belongs to a weight that is not there"),
    "scale is nan": (scale(torch.nan), f"{SCALE} must be positive and finite"),
    "scale is infinite": (scale(torch.inf), f"{SCALE} must be positive and finite"),
    "scale is zero": (scale(0), f"{SCALE} must be positive and finite"),
    "scale is negative": (scale(-1, (128, 1)), f"{SCALE} must be positive and finite"),
    "scales of columns": (scale(1, (1, 256)), f"{SCALE} has shape [1, 256]"),
    "scales of blocks": (scale(1, (128, 4)), f"{SCALE} has shape [128, 4]"),
    "too few scales": (scale(1, (127, 1)), "must be one number or have the shape [128, 1]"),
    "mxfp8's scales": (scale(1, (128, 8), torch.uint8), "as scales of mxfp8 are"),
    "scales in fp8": (scale(1, (128, 8), torch.float8_e4m3fn), "is stored as F8_E4M3, as scales"),
    "two scales": (
        lambda t: t.update({f"{MATRIX}.scale_weight": torch.ones(())}),
        "are scales of the same weight",
    ),
    "input scale is nan": (
        lambda t: t.update({INPUT: torch.tensor(torch.nan)}),
        f"{INPUT} must be positive and finite",
    ),
    "input scale of rows": (lambda t: t.update({INPUT: torch.ones(128)}), "it must be one number"),
    "input scale alone": (
        lambda t: (t.update({INPUT: torch.ones(())}), t.pop(SCALE), t.pop(MARKER)),
        f"{INPUT} belongs to a weight that has no scale",
    ),
    "unknown format": (marked(format="fp9"), f"{MARKER} says the format 'fp9', which is not read"),
    "mxfp8": (marked(format="mxfp8"), "says the format 'mxfp8', which is not read; use a file in"),
    "nvfp4": (marked(format="nvfp4"), "says the format 'nvfp4', which is not read; use a file in"),
    "no format": (marked(format=None), "says the format None"),
    "another format": (marked(format="float8_e5m2"), "its marker says F8_E5M2"),
    "unknown word": (marked(spin=1), f"{MARKER} says 'spin', which is not understood"),
    "no flag": (marked(full_precision_matrix_mult=1), "says full_precision_matrix_mult 1, it must"),
    "rotated": (marked(convrot=True), "says that float8_e4m3fn is rotated"),
    "another shape": (marked(orig_shape=[128, 250]), "its marker says [128, 250]"),
    "strange params": (marked(params=3), "has params 3"),
    "no JSON": (
        lambda t: t.update({MARKER: torch.tensor([123], dtype=torch.uint8)}),
        f"{MARKER} is no JSON",
    ),
    "no object": (lambda t: t.update({MARKER: marker_tensor([1])}), "it must be a JSON object"),
    "no bytes": (lambda t: t.update({MARKER: torch.zeros(2)}), "must be the bytes of a JSON"),
    "huge marker": (
        lambda t: t.update({MARKER: torch.zeros(2**16 + 1, dtype=torch.uint8)}),
        "must be the bytes of a JSON",
    ),
    "marker alone": (
        lambda t: (t.pop(KEY), t.pop(SCALE)),
        f"{MARKER} belongs to a weight that is not there",
    ),
    "weight is bf16": (
        lambda t: t.update({KEY: torch.zeros(128, 256, dtype=torch.bfloat16)}),
        "is stored as BF16, its marker says F8_E4M3",
    ),
    "weight is bf16, no marker": (
        lambda t: (t.update({KEY: t[KEY].bfloat16()}), t.pop(MARKER)),
        f"{KEY} is stored as BF16 and has a scale",
    ),
    "weight is int8": (
        lambda t: t.update({KEY: torch.zeros(128, 256, dtype=torch.int8)}),
        "is stored as I8, its marker says F8_E4M3",
    ),
    "weight is f64": (
        lambda t: t.update({KEY: torch.zeros(128, 256, dtype=torch.float64)}),
        f"{KEY} is stored as F64; use a file in",
    ),
    "weight is packed": (
        lambda t: t.update({KEY: torch.zeros(128, 128, dtype=torch.uint8)}),
        "packs several numbers into a byte",
    ),
    "weight has another shape": (
        lambda t: t.update({KEY: t[KEY][:, :128]}),
        f"{KEY} has shape [128, 128], expected [128, 256]",
    ),
    "weight is empty": (lambda t: t.update({KEY: t[KEY][:, :0]}), "there is nothing in it"),
    "weight is a vector": (lambda t: t.update({KEY: t[KEY][0]}), "has shape [256] and a scale"),
    "stray matrix": (
        lambda t: t.update({"last.down.weight": torch.zeros(2, 2)}),
        "unexpected tensors: last.down.weight",
    ),
    "stray tensor": (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensors: extra"),
    "missing tensor": (lambda t: [t.pop(k) for k in (KEY, SCALE, MARKER)], "are missing:"),
    "strange name": (lambda t: t.update({"a\nb": torch.zeros(1)}), "is no name of a tensor"),
    "strange file marker": (
        lambda t: t.update(scaled_fp8=torch.zeros(3)),
        "scaled_fp8 is F32 [3], which is not understood",
    ),
}


def tensors_for(expected: str) -> dict[str, torch.Tensor]:
    """A whole model where it is looked at as one, else few tensors."""
    if "tensors" in expected or "expected" in expected or "missing" in expected:
        return state_dict()
    return {name: state_dict()[name] for name in (KEY, "blocks.0.mlp.up.weight", "last.norm.scale")}


@pytest.mark.parametrize("name", WRONG_FP8)
def test_fp8_scaled_that_is_wrong_in_one_part(name, tmp_path):
    spoil, expected = WRONG_FP8[name]
    write_fp8_scaled(tensors_for(expected), tmp_path / "some", spoil=spoil)
    assert expected in refusal(tmp_path / "some")


WRONG_INT8 = {
    "no scale": (lambda t: t.pop(SCALE), f"{KEY} is stored as I8 and has no scale"),
    "no marker": (lambda t: t.pop(MARKER), f"{KEY} has no marker that says whether it is rotated"),
    "size": (marked_int8(convrot=True, convrot_groupsize=128), "convrot_groupsize 128, not one of"),
    "too wide": (
        marked_int8(convrot=True, convrot_groupsize=1024),
        f"{KEY} has 256 columns, its marker says groups of 1024",
    ),
    "size in words": (
        marked_int8(convrot=True, convrot_groupsize="256"),
        "convrot_groupsize '256'",
    ),
    "no flag": (marked_int8(convrot="yes"), "says convrot 'yes', it must be true or false"),
    "w4a4": (marked_int8(format="convrot_w4a4"), "says the format 'convrot_w4a4', which is not"),
    "scales of groups": (scale(1, (128, 1, 1)), f"{SCALE} has shape [128, 1, 1]"),
    "three dimensions": (
        lambda t: t.update({KEY: t[KEY].view(128, 16, 16)}),
        f"{KEY} has shape [128, 16, 16] and a scale",
    ),
}


@pytest.mark.parametrize("name", WRONG_INT8)
def test_int8_that_is_wrong_in_one_part(name, tmp_path):
    spoil, expected = WRONG_INT8[name]
    write_int8(tensors_for(expected), tmp_path / "some", spoil=spoil)
    assert expected in refusal(tmp_path / "some")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (header(lambda t: t.update(gone=t[MATRIX])), "names 'gone', which has no weight"),
        (header(lambda t: t.update({MATRIX: {"format": "x"}})), f"{MATRIX!r} says the format 'x'"),
        (header(lambda t: t.update({MATRIX: 3})), f"{MATRIX!r} is 3, it must be a JSON object"),
        (lambda t: t[METADATA].update({HEADER: "{"}), f"{HEADER} in its header is no JSON"),
        (lambda t: t[METADATA].update({HEADER: "[" * 10**5}), "in its header is no JSON"),
        (lambda t: t[METADATA].update({HEADER: "[]"}), f"{HEADER} in its header has no layers"),
        (lambda t: t[METADATA].update({HEADER: '{"layers": 1}'}), "in its header has no layers"),
        (marked_int8(convrot=False), f"and the header's {HEADER} says another"),
    ],
)
def test_markers_of_the_header_that_are_wrong(spoil, expected, tmp_path):
    write_int8(tensors_for(expected), tmp_path / "some", marker="both", spoil=spoil)
    assert expected in refusal(tmp_path / "some")


def test_markers_of_two_files_that_differ(tmp_path):
    write_int8(tensors_for("says another"), tmp_path / "a", marker="metadata")
    said = {"layers": {MATRIX: {"format": "int8_tensorwise"}}}
    save_file({"x": torch.zeros(1)}, tmp_path / "b", {HEADER: json.dumps(said)})
    with (
        pytest.raises(CheckpointError, match="says another of"),
        open_files([tmp_path / "a", tmp_path / "b"]),
    ):
        pass


def test_an_old_file_marker_wants_a_scale_for_every_matrix(tmp_path):
    write_plain(
        state_dict(),
        tmp_path / "some",
        dtype=torch.float8_e4m3fn,
        spoil=lambda t: t.update(scaled_fp8=torch.empty(0, dtype=torch.float8_e4m3fn)),
    )
    assert "is stored as F8_E4M3 and has no scale" in refusal(tmp_path / "some")


def small(*names: str, dtype: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(4, 4, dtype=dtype) for name in names}


OTHERS = {
    "nvfp4": (small("a.weight", "a.weight_scale", "a.weight_scale_2"), "is nvfp4"),
    "svdquant": (small("a.qweight", "a.wscales", "a.lora_down"), "is svdquant (nunchaku)"),
    "4 bits": (small("a.qweight", "a.qzeros"), "is 4 bits packed (svdquant, GPTQ or AWQ)"),
    "nf4": (
        small("a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"),
        "is bitsandbytes nf4",
    ),
    "blocks": (small("a.weight", "a.weight_scale_inv"), "is fp8 with a scale for each block"),
    "w4a8": (small("a.weight", "a.weight_s_rel"), "is w4a8"),
    "lora": (small("t.a.lora_A.weight", "t.a.lora_B.weight"), "is an adapter, as t.a.lora_A"),
    "kohya": (small("lora_unet_a.lora_down.weight"), "is an adapter, as lora_unet_a"),
    "lokr": (small("a.lokr_w1"), "is an adapter, as a.lokr_w1"),
    "another model": (small("a.weight", dtype=torch.float32), "not a Krea 2 checkpoint"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(name, tmp_path):
    tensors, expected = OTHERS[name]
    save_file(tensors, tmp_path / "some")
    assert expected in refusal(tmp_path / "some")


def test_pickles_pages_and_pointers_are_named(tmp_path):
    file = tmp_path / "some"
    for protocol in (2, 4):
        file.write_bytes(pickle.dumps({"x": 1}, protocol))
        assert refusal(file).startswith(" is a PyTorch pickle, which can run code; use a file in")
    torch.save({"x": torch.zeros(2)}, file)
    assert zipfile.is_zipfile(file)
    assert "is a PyTorch pickle" in refusal(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a pointer of Git LFS" in refusal(file)
    file.write_text("<!doctype html>")
    assert "is a web page" in refusal(file)
    file.write_bytes(b"")
    assert "is damaged" in refusal(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"weight file .*gone cannot be read: No such file"),
        open_files([tmp_path / "gone"]),
    ):
        pass


def test_names_of_both_releases_in_one_file(tmp_path):
    both = state_dict() | {"transformer_blocks.0.attn.to_k.weight": state_dict()[KEY]}
    write_plain(both, tmp_path / "some")
    assert "blocks.0.attn.gate.weight is a name of the original layout" in refusal(
        tmp_path / "some"
    )


def test_a_prefix_that_only_some_names_have(tmp_path):
    some = {k: v for k, v in state_dict().items() if k.startswith("last.")}
    others = {k: v for k, v in state_dict().items() if k not in some}
    write_plain(prefixed(others, "model.") | some, tmp_path / "some")
    said = refusal(tmp_path / "some")
    assert said.startswith("model.")
    assert "begins with model., last." in said
    everything = prefixed(state_dict(), "model.diffusion_model.")
    write_plain(everything | {"vae.conv.weight": torch.zeros(4, 4)}, tmp_path / "some")
    assert "begins with model.diffusion_model., vae.conv.weight does not" in refusal(
        tmp_path / "some"
    )


@pytest.mark.parametrize("write", [write_plain, write_gguf])
def test_a_tensor_that_two_files_have(tmp_path, write):
    write_plain({"x.weight": torch.zeros(2, 32)}, tmp_path / "a")
    write({"x.weight": torch.zeros(2, 32)}, tmp_path / "b")
    with (
        pytest.raises(CheckpointError, match=r"b: x\.weight is there twice"),
        open_files([tmp_path / "a", tmp_path / "b"]),
    ):
        pass


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_types_of_gguf_that_are_not_read(kind, tmp_path):
    file = tmp_path / "some"
    write_gguf(state_dict(), file, kind=kind)
    if kind == "Q8_0":
        # A Q4_K file cannot be written by gguf: its type is put where that of a matrix is.
        data = bytearray(file.read_bytes())
        at = data.index(KEY.encode()) + len(KEY) + 4 + 2 * 8
        assert data[at] == 8
        data[at] = 12
        file.write_bytes(data)
        kind = "Q4_K"
    said = refusal(file)
    assert f"is stored as {kind}; of GGUF's types Q8_0, F16, BF16, F32 are read; use Q8_0" in said


def test_gguf_with_llama_cpps_names(tmp_path):
    write_gguf({"blk.0.attn_q.weight": torch.zeros(4, 32)}, tmp_path / "some")
    assert "has llama.cpp's names (blk.0.attn_q.weight)" in refusal(tmp_path / "some")


def test_gguf_that_lacks_a_tensor_has_one_more_or_of_another_shape(tmp_path):
    file = tmp_path / "some"
    write_gguf(state_dict(), file, spoil=lambda t: t.pop(KEY))
    assert "tensors are missing" in refusal(file)
    write_gguf(state_dict(), file, spoil=lambda t: t.update(extra=torch.zeros(3)))
    assert "unexpected tensors: extra" in refusal(file)
    write_gguf(state_dict(), file, spoil=lambda t: t.update({KEY: torch.zeros(128, 32)}))
    assert "has shape [128, 32], expected [128, 256]" in refusal(file)
    write_gguf({"a.lora_up.weight": torch.zeros(3)}, file)
    assert "is an adapter" in refusal(file)


def test_without_the_gguf_package_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    import sys

    write_gguf(state_dict(), tmp_path / "some")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "the gguf package is not installed; uv pip install '.'" in refusal(tmp_path / "some")
