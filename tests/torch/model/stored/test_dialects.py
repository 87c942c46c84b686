"""Files in every format that is read: the model is that of what the file means."""

import logging

import pytest
import torch

from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.model.dit_files import diffusers_name, dit_config, load_dit
from krea2_srt.model.quantization import SERVED, Quantization, QuantizedLinear
from krea2_srt.model.stored import chunks
from krea2_srt.model.stored.files import open_files
from tests.comparisons import CPU, relative_error
from tests.dialects import (
    E4M3,
    E5M2,
    METADATA,
    all_matrices,
    prefixed,
    write_fp8_scaled,
    write_gguf,
    write_int8,
    write_plain,
)
from tests.torch.model.stored.small import (
    CONFIG,
    MATRICES_OF_BLOCKS,
    MATRIX,
    load,
    state_dict,
    twin,
    velocity,
)

FP8, INT8 = Quantization("fp8"), Quantization("int8")
ROTATED = SERVED["int8"]
BLOCKS = "blocks."


def in_blocks(name, tensor):
    return name.startswith(BLOCKS) and all_matrices(name, tensor)


DIALECTS = {
    "bf16": lambda t, f: write_plain(t, f),
    "f16": lambda t, f: write_plain(t, f, dtype=torch.float16),
    "f32": lambda t, f: write_plain(t, f, dtype=torch.float32),
    "fp8 e4m3": lambda t, f: write_plain(t, f, dtype=E4M3),
    "fp8 e5m2": lambda t, f: write_plain(t, f, dtype=E5M2),
    "fp8_scaled, as of 2024": lambda t, f: write_fp8_scaled(
        t, f, spelling="scale_weight", marker="scaled_fp8", input_scale=True
    ),
    "fp8_scaled, markers": lambda t, f: write_fp8_scaled(t, f, input_scale=True),
    "fp8_scaled, header": lambda t, f: write_fp8_scaled(t, f, marker="metadata"),
    "fp8_scaled, unmarked": lambda t, f: write_fp8_scaled(t, f, marker="none"),
    "fp8_scaled, rows": lambda t, f: write_fp8_scaled(t, f, per_row=True, full_precision=True),
    "fp8_scaled, flat rows": lambda t, f: write_fp8_scaled(t, f, per_row=True, flat=True),
    "fp8_scaled, blocks only": lambda t, f: write_fp8_scaled(t, f, chooses=in_blocks),
    "fp8_scaled, e5m2": lambda t, f: write_fp8_scaled(t, f, dtype=E5M2),
    "int8_convrot": lambda t, f: write_int8(t, f),
    "int8_convrot, header": lambda t, f: write_int8(t, f, marker="metadata", flat=True),
    "int8_convrot, both": lambda t, f: write_int8(t, f, marker="both"),
    "int8_convrot, groups": lambda t, f: write_int8(t, f, group=lambda s: 64 if "attn" in s else 4),
    "int8": lambda t, f: write_int8(t, f, group=0),
    "int8, one scale": lambda t, f: write_int8(t, f, group=0, per_row=False),
    "Q8_0": lambda t, f: write_gguf(t, f),
    "GGUF F16": lambda t, f: write_gguf(t, f, kind="F16"),
    "GGUF BF16": lambda t, f: write_gguf(t, f, kind="BF16"),
    "GGUF F32": lambda t, f: write_gguf(t, f, kind="F32"),
}


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return DIALECTS[request.param]


def test_the_model_is_that_of_what_the_file_means(dialect, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_ELEMENTS_AT_ONCE", 100 * 256)  # not a whole matrix
    meant = dialect(state_dict(), tmp_path / "some.safetensors")
    dit, expected = load(tmp_path / "some.safetensors"), twin(meant, tmp_path)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(dit.state_dict()[name], tensor, rtol=1e-5, atol=1e-6), name
    assert relative_error(velocity(dit), velocity(expected)) <= 1e-5


@pytest.mark.parametrize(
    ("prefix", "diffusers"), [("model.diffusion_model.", False), ("module.model.", True)]
)
@pytest.mark.parametrize("name", ["fp8_scaled, as of 2024", "int8_convrot, header", "Q8_0"])
def test_names_may_be_of_either_release_and_with_a_prefix(name, tmp_path, prefix, diffusers):
    plain, file = tmp_path / "plain", tmp_path / "some"
    DIALECTS[name](state_dict(), plain)
    tensors = state_dict()
    if diffusers:
        tensors = {
            diffusers_name(k): v.view(6, -1) if k.endswith("mod.lin") else v
            for k, v in tensors.items()
        }
    DIALECTS[name](prefixed(tensors, prefix), file)
    assert dit_config(file) == CONFIG
    expected = load(plain).state_dict()
    for key, tensor in load(file).state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_markers_of_the_header_may_lack_the_prefix(tmp_path):
    def without(tensors):
        metadata = tensors[METADATA]["_quantization_metadata"]
        tensors[METADATA]["_quantization_metadata"] = metadata.replace("diffusion_model.", "")

    meant = write_int8(state_dict(), tmp_path / "plain")
    assert meant.keys() == state_dict().keys()
    write_int8(
        prefixed(state_dict(), "diffusion_model."),
        tmp_path / "some",
        marker="metadata",
        spoil=without,
    )
    expected = load(tmp_path / "plain").state_dict()
    for key, tensor in load(tmp_path / "some").state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_scales_may_lie_in_another_file_than_their_weight(tmp_path):
    moved = {}

    def keep_scales(tensors):
        for key in [k for k in tensors if k.endswith("weight_scale")]:
            moved[key] = tensors.pop(key)

    write_fp8_scaled(state_dict(), tmp_path / "a", spoil=keep_scales)
    write_plain(moved, tmp_path / "b", dtype=torch.float32)
    meant = write_fp8_scaled(state_dict(), tmp_path / "whole")
    with open_files([tmp_path / "a", tmp_path / "b"]) as opened:
        assert opened.tensors.keys() == meant.keys()
        for key, tensor in opened.tensors.items():
            assert torch.equal(tensor.read().float(), meant[key]), key


def quantised(dit) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in dit.named_modules() if isinstance(m, QuantizedLinear)}


def parts(name: str) -> list[str]:
    """The original names of the parts of one of the DiT's matrices."""
    _, block, room, matrix = name.split(".")
    inner = {
        "attn.qkvg": ["attn.wq", "attn.wk", "attn.wv", "attn.gate"],
        "attn.out": ["attn.wo"],
        "ff.gate_up": ["mlp.gate", "mlp.up"],
        "ff.down": ["mlp.down"],
    }[f"{room}.{matrix}"]
    return [f"blocks.{block}.{part}" for part in inner]


TAKEN = {
    "fp8, a scale each": (FP8, lambda t, f, s: write_fp8_scaled(t, f, spoil=s)),
    "fp8, rows": (FP8, lambda t, f, s: write_fp8_scaled(t, f, per_row=True, spoil=s)),
    "fp8 without scales": (FP8, lambda t, f, s: write_plain(t, f, dtype=E4M3, spoil=s)),
    "int8": (INT8, lambda t, f, s: write_int8(t, f, group=0, spoil=s)),
    "int8, one scale": (INT8, lambda t, f, s: write_int8(t, f, group=0, per_row=False, spoil=s)),
    "int8_convrot": (ROTATED, lambda t, f, s: write_int8(t, f, spoil=s)),
    "int8_convrot, 64": (ROTATED, lambda t, f, s: write_int8(t, f, group=64, spoil=s)),
    "int8, mixed": (
        ROTATED,
        lambda t, f, s: write_int8(t, f, group=lambda n: 0 if "mlp.down" in n else 256, spoil=s),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_eight_bits_that_fit_are_taken_bit_for_bit(name, tmp_path):
    quantization, write = TAKEN[name]
    stored = {}
    meant = write(state_dict(), tmp_path / "some", lambda tensors: stored.update(tensors))
    dit = load(tmp_path / "some", quantization)
    assert len(quantised(dit)) == 4 * CONFIG.num_layers
    for linear_name, linear in quantised(dit).items():
        some = parts(linear_name)
        assert torch.equal(linear.weight, torch.cat([stored[f"{p}.weight"] for p in some]))
        scales = [
            stored.get(f"{p}.weight_scale", torch.ones(()))
            .reshape(-1, 1)
            .expand(len(stored[f"{p}.weight"]), 1)
            for p in some
        ]
        assert torch.equal(linear.scale, torch.cat(scales))
        assert linear.scale.is_contiguous()
    # Beside the twin only the tokens are rounded, and that is all.
    error = relative_error(velocity(dit), velocity(twin(meant, tmp_path)))
    assert 0 < error < (0.1 if quantization is FP8 else 0.04)


def test_diffusers_names_are_taken_bit_for_bit_too(tmp_path):
    names = {diffusers_name(key): key for key in state_dict()}
    tensors = {
        name: state_dict()[key].view(6, -1) if key.endswith("mod.lin") else state_dict()[key]
        for name, key in names.items()
    }
    stored: dict[str, torch.Tensor] = {}
    write_int8(tensors, tmp_path / "diffusers", spoil=stored.update)
    write_int8(state_dict(), tmp_path / "original")
    dit, same = load(tmp_path / "diffusers", ROTATED), load(tmp_path / "original", ROTATED)
    for name, tensor in same.state_dict().items():
        assert torch.equal(dit.state_dict()[name], tensor), name
    back = {key: name for name, key in names.items()}
    for linear_name, linear in quantised(dit).items():
        files = [back[f"{part}.weight"] for part in parts(linear_name)]
        assert torch.equal(linear.weight, torch.cat([stored[name] for name in files]))


def test_parts_of_a_matrix_that_are_rotated_otherwise_go_through_float32(tmp_path):
    meant = write_int8(
        state_dict(), tmp_path / "some", group=lambda n: 256 if n.endswith(".wq") else 16
    )
    dit, expected = load(tmp_path / "some", ROTATED), twin(meant, tmp_path, ROTATED)
    for name, linear in quantised(dit).items():
        if name.endswith("qkvg"):
            assert linear.format == quantised(expected)[name].format
            means = linear.weight.float() * linear.scale
            wanted = quantised(expected)[name]
            # 16 is also what would be taken of our own accord: those parts are as they are.
            assert relative_error(means, wanted.weight.float() * wanted.scale) < 1e-2
        else:
            assert linear.format == TokenFormat(torch.int8, 16)


@pytest.mark.parametrize("quantization", [FP8, INT8, Quantization("fp8", rotation=True)])
def test_eight_bits_that_do_not_fit_go_through_float32(tmp_path, quantization):
    meant = write_int8(state_dict(), tmp_path / "some")
    dit, expected = load(tmp_path / "some", quantization), twin(meant, tmp_path, quantization)
    for name, linear in quantised(dit).items():
        wanted = quantised(expected)[name]
        assert linear.format == wanted.format
        assert torch.allclose(linear.scale, wanted.scale, rtol=1e-5)
        off = (linear.weight.float() != wanted.weight.float()).float().mean()
        assert off < 1e-2  # sums in another order, at the edge of a step


def log_of(caplog, file, quantization=None, dtype=torch.float32) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "krea2_srt.model"):
        load_dit(file, CPU, dtype, quantization)
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.startswith(f"krea2-srt: {file}: ") for line in lines)
    return [line.removeprefix(f"krea2-srt: {file}: ") for line in lines]


def test_one_line_says_what_became_of_the_file(tmp_path, caplog):
    file = tmp_path / "some.safetensors"
    meant = write_fp8_scaled(state_dict(), file, input_scale=True, full_precision=True)
    matrices = sum(all_matrices(f"{k}", t) for k, t in state_dict().items())
    others = matrices - MATRICES_OF_BLOCKS
    rest = len(meant) - matrices
    notes = (
        f"; {matrices} scales of activations are not used, tokens are quantised by their own"
        f"; {matrices} matrices are marked full_precision_matrix_mult"
    )
    assert log_of(caplog, file, FP8, torch.bfloat16) == [
        f"{MATRICES_OF_BLOCKS} matrices fp8_scaled, taken as they are; "
        f"{others} matrices fp8_scaled, dequantised to bfloat16; {rest} tensors bf16{notes}"
    ]
    assert log_of(caplog, file, None, torch.bfloat16) == [
        f"{matrices} matrices fp8_scaled, dequantised to bfloat16 "
        "(--quantization fp8 would take those of the blocks as they are); "
        f"{rest} tensors bf16{notes}"
    ]
    (line,) = log_of(caplog, file, INT8)
    assert (
        f"; {MATRICES_OF_BLOCKS} matrices fp8_scaled, dequantised and quantised to int8; " in line
    )
    write_int8(state_dict(), file, chooses=in_blocks)
    assert log_of(caplog, file, ROTATED, torch.bfloat16) == [
        f"{MATRICES_OF_BLOCKS} matrices int8_convrot, taken as they are; "
        f"{rest + others} tensors bf16"
    ]
    assert log_of(caplog, file, None, torch.bfloat16) == [
        f"{MATRICES_OF_BLOCKS} matrices int8_convrot, dequantised to bfloat16 "
        "(--quantization int8 would take those of the blocks as they are); "
        f"{rest + others} tensors bf16"
    ]
    write_int8(state_dict(), file, group=lambda n: 0 if MATRIX in n else 4, chooses=in_blocks)
    assert log_of(caplog, file, FP8, torch.bfloat16) == [
        f"{MATRICES_OF_BLOCKS - 1} matrices int8_convrot, dequantised and quantised to fp8; "
        f"1 matrix int8, dequantised and quantised to fp8; {rest + others} tensors bf16"
    ]
    write_plain(state_dict(), file, dtype=E4M3)
    assert log_of(caplog, file, FP8)[0].startswith(
        f"{MATRICES_OF_BLOCKS} tensors F8_E4M3, taken as they are; "
    )
    write_plain(state_dict(), file)
    assert log_of(caplog, file) == log_of(caplog, file, ROTATED) == []


def test_the_line_has_what_is_quantised_beside_what_is_taken(tmp_path, caplog):
    """A file that leaves some matrices of the blocks alone has them so without --quantization."""
    file = tmp_path / "some.safetensors"
    # Its rotation is that of all the parts that are multiplied with it, which have none yet.
    write_int8(state_dict(), file, group=64, chooses=lambda name, _: name == f"{MATRIX}.weight")
    rest = len(state_dict()) - MATRICES_OF_BLOCKS
    assert log_of(caplog, file, ROTATED) == [
        "1 matrix int8_convrot, taken as they are; "
        f"{MATRICES_OF_BLOCKS - 1} matrices bf16, quantised to int8; {rest} tensors bf16"
    ]


def test_a_file_may_have_matrices_of_several_formats(tmp_path, caplog):
    """Each has its marker, so there is nothing to guess; the log names all of them."""
    file, attention = tmp_path / "some", lambda n, t: in_blocks(n, t) and ".attn." in n
    other: dict[str, torch.Tensor] = {}
    meant = write_fp8_scaled(
        state_dict(), tmp_path / "fp8", chooses=attention, spoil=lambda t: other.update(t)
    )
    for key in [k for k in other if ".attn." not in k]:
        other.pop(key)
    rest = {key: tensor for key, tensor in state_dict().items() if key not in other}
    meant |= write_int8(rest, file, spoil=lambda t: t.update(other))
    expected = twin(meant, tmp_path)
    for key, tensor in load(file).state_dict().items():
        assert torch.allclose(tensor, expected.state_dict()[key], rtol=1e-5, atol=1e-6), key
    (line,) = log_of(caplog, file, FP8)
    assert f"{5 * CONFIG.num_layers} matrices fp8_scaled, taken as they are; " in line
    assert "matrices int8_convrot, dequantised and quantised to fp8; " in line


@pytest.mark.parametrize("shape", [(64,), (3, 2, 32)])
def test_tensors_of_gguf_may_have_any_dimensions(tmp_path, shape):
    meant = write_gguf({"x": torch.randn(shape)}, tmp_path / "some", chooses=lambda n, t: True)
    with open_files([tmp_path / "some"]) as opened:
        assert opened.tensors["x"].kind == "Q8_0"
        assert torch.equal(opened.tensors["x"].read(), meant["x"])


@pytest.mark.parametrize("per_row", [False, True])
def test_kernels_of_convolutions_may_have_scales(tmp_path, per_row):
    kernels = {"conv.weight": torch.randn(6, 4, 1, 3, 3), "conv.bias": torch.randn(6)}
    meant = write_fp8_scaled(
        kernels,
        tmp_path / "some",
        per_row=per_row,
        flat=True,
        chooses=lambda name, tensor: tensor.dim() > 1,
    )
    with open_files([tmp_path / "some"]) as opened:
        assert opened.tensors["conv.weight"].eight_bit is None
        for key, tensor in opened.tensors.items():
            assert torch.equal(tensor.read().float(), meant[key])


def test_files_say_of_themselves_what_they_say(tmp_path):
    write_plain(state_dict(), tmp_path / "a", metadata={"recipe": "turbo"})
    write_gguf(state_dict(), tmp_path / "b", metadata={"krea2.recipe": "raw"})
    with open_files([tmp_path / "a"]) as opened:
        assert opened.metadata == {"recipe": "turbo"}
    with open_files([tmp_path / "b"]) as opened:
        assert opened.metadata["krea2.recipe"] == "raw"
        assert opened.metadata["general.architecture"] == "krea2"


def test_reading_a_tensor_reads_that_one_only_and_once(tmp_path, monkeypatch):
    """Not a row of the others; weights with scales are read row by row, each row once."""
    from krea2_srt.model.stored.plain import PlainTensor

    monkeypatch.setattr(chunks, "_ELEMENTS_AT_ONCE", 10 * 256)
    read: list[tuple[str, object]] = []
    whole, rows = PlainTensor.read, PlainTensor.read_rows

    def watched(self):
        read.append((self.key, None))
        return whole(self)

    def watched_rows(self, some):
        read.append((self.key, some))
        assert some.stop - some.start <= 10
        return rows(self, some)

    monkeypatch.setattr(PlainTensor, "read", watched)
    monkeypatch.setattr(PlainTensor, "read_rows", watched_rows)
    write_int8(state_dict(), tmp_path / "some")
    with open_files([tmp_path / "some"]) as opened:
        assert {key.rpartition(".")[2] for key, _ in read} == {"weight_scale", "comfy_quant"}
        assert len({key for key, _ in read}) == len(read)
        read.clear()
        opened.tensors[f"{MATRIX}.weight"].read()
    assert {key for key, _ in read} == {f"{MATRIX}.weight"}
    covered = [i for _, some in read for i in range(some.start, some.stop)]
    assert covered == list(range(128))


def test_the_original_shape_of_a_gguf_tensor_is_what_the_model_sees(tmp_path):
    import gguf

    data = torch.arange(64, dtype=torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "some", "krea2")
    writer.add_array("comfy.gguf.orig_shape.x", [2, 4, 8])
    writer.add_tensor(
        "x",
        gguf.quants.quantize(data.view(2, 32).numpy(), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_files([tmp_path / "some"]) as opened:
        assert opened.tensors["x"].shape == (2, 4, 8)
        assert (opened.tensors["x"].read() - data.view(2, 4, 8)).abs().max() < 0.3


def test_an_adapter_is_merged_into_what_the_file_means(tmp_path):
    class Twice:
        def added_to(self, stored, format):
            return stored.to(torch.float32, copy=True) * 2

    name = f"{diffusers_name(MATRIX + '.weight')}"
    for dialect in ("fp8_scaled, rows", "fp8 e4m3"):
        meant = DIALECTS[dialect](state_dict(), tmp_path / "some")
        dit = load_dit(tmp_path / "some", CPU, torch.float32, FP8, {name: Twice()})
        linear = quantised(dit)["blocks.1.attn.qkvg"]
        rows = slice(256, 256 + 128)
        got = linear.weight[rows].float() * linear.scale[rows]
        assert relative_error(got, 2 * meant[f"{MATRIX}.weight"]) < 0.05
