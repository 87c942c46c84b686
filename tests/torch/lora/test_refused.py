"""Files that are refused: one line, with the file and the key, and what is wrong."""

import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from krea2_srt.errors import AdapterError
from krea2_srt.lora.limits import Limits
from krea2_srt.lora.reader import read_adapter
from tests.torch.lora.forms import random_pair
from tests.torch.lora.test_vocabulary import SMALL

Q = "transformer.transformer_blocks.0.attn.to_q"  # [64, 64] in the small model
DOWN, UP, ALPHA = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.alpha"


def good() -> dict[str, torch.Tensor]:
    pair = random_pair((64, 64), 4, 4, torch.Generator().manual_seed(0))
    return {DOWN: pair.down, UP: pair.up}


def refusal(path: Path, limits: Limits = Limits()) -> str:  # noqa: B008 (frozen)
    """What `read_adapter` says, which is one line and names the file."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, SMALL, limits)
    text = str(caught.value)
    assert text.isprintable(), text
    assert text.startswith(f"adapter {path}: ")
    assert len(text) < 1000
    return text.removeprefix(f"adapter {path}: ")


@contextmanager
def refused_or_fine(path: Path) -> Iterator[None]:
    """All but a refusal goes through; that is one line and names the file."""
    try:
        yield
    except AdapterError as error:
        said = str(error)
    else:
        return
    assert said.isprintable()
    assert said.startswith(f"adapter {path}: ")


def refusal_of(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
    file = folder / "some.safetensors"
    save_file(tensors, file, metadata=metadata or None)
    return refusal(file)


def test_the_file_that_the_others_here_spoil_is_read(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file(good(), file)
    adapter = read_adapter(file, SMALL)
    assert (adapter.name, adapter.rank, adapter.nbytes) == ("some", 4, 2 * 4 * 64 * 4)


def test_an_adapter_stays_as_it_was_read_whatever_becomes_of_its_file(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file(good(), file)
    ((factor,),) = read_adapter(file, SMALL).matrices.values()
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
    assert torch.equal(factor.down, good()[DOWN])
    assert torch.equal(factor.up, good()[UP])


ONE = torch.ones(1)
KEYS = {
    "lora_te_text_model_encoder_layers_0.lora_down.weight": "of a text encoder",
    "lora_te1_layers_0.alpha": "of a text encoder",
    "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": "of a text encoder",
    "text_encoders.qwen.lora_up.weight": "of a text encoder",
    "base_model.model.text_encoder.layers.0.lora_A.weight": "of a text encoder",
    "vae.decoder.conv.lora_A.weight": "of a VAE",
    f"{Q}.dora_scale": "of a DoRA",
    f"{Q}.lora_magnitude_vector": "of a DoRA",
    f"{Q}.lora_magnitude_vector.default.weight": "of a DoRA",
    f"{Q}.hada_w1_a": "of a LoHa",
    f"{Q}.lora_mid.weight": "of a convolution",
    f"{Q}.lokr_t2": "of a convolution",
    f"{Q}.diff": "a difference of weights, not a LoRA",
    f"{Q}.diff_b": "a difference of biases, not a LoRA",
    f"{Q}.lora_B.bias": "a difference of biases, not a LoRA",
    f"{Q}.lora_B.default.bias": "a difference of biases, not a LoRA",
    f"{Q}.set_weight": "a weight in place of the model's, not a LoRA",
    f"{Q}.reshape_weight": "another shape for a weight, not a LoRA",
    f"{Q}.w_norm": "a difference of a norm, not a LoRA",
    f"{Q}.oft_blocks": "of an OFT",
    f"{Q}.a1.weight": "of a GLoRA",
    f"{Q}.on_input": "of an (IA)³",
    f"{Q}.lora_embedding_A": "of an embedding",
    f"{Q}.weight": "a weight itself, not a LoRA; is this a checkpoint?",
    "diffusion_model.blocks.0.prenorm.scale": "a weight itself, not a LoRA",
    "transformer.transformer_blocks.0.norm1.lora_A.weight": "of no matrix of this model",
    "transformer.transformer_blocks.2.attn.to_q.lora_A.weight": "of no matrix of this model",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "of no matrix of this model",
    "transformer.lora_A.weight": "of no matrix of this model",
    "surprise": "not understood; a LoRA's keys end in",
    ".lora_A.weight": "a weight itself",
    "": "not understood",
    f"../../{Q}.lora_A.weight": "of no matrix of this model",
}


@pytest.mark.parametrize("key", KEYS)
def test_one_key_that_is_not_understood_is_enough(key, tmp_path):
    said = refusal_of(tmp_path, good() | {key: ONE})
    assert said.startswith(f"{key} is {KEYS[key]}")


NAN, INFINITE = torch.full((4, 64), torch.nan), torch.full((64, 4), torch.inf)
LARGE, LARGER = torch.full((64, 4), 1e38), torch.full((64, 4), 1e300, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: None}, f"{DOWN} has no up factor beside it"),
        ({DOWN: None}, f"{UP} has no down factor beside it"),
        ({DOWN: None, UP: None, ALPHA: ONE}, f"{ALPHA} has no factors beside it"),
        ({DOWN: torch.ones(3, 64)}, f"{DOWN} has rank 3, {UP} 4"),
        ({DOWN: torch.ones(4, 63)}, f"{DOWN}: shape [4, 63], expected [rank, 64]"),
        ({DOWN: torch.ones(256)}, f"{DOWN}: shape [256], expected [rank, 64]"),
        ({DOWN: torch.ones(4, 64, 3, 3)}, f"{DOWN}: shape [4, 64, 3, 3], expected [rank, 64]"),
        ({UP: torch.ones(96, 4)}, f"{UP}: shape [96, 4], expected [64, rank]"),
        ({DOWN: torch.ones(0, 64), UP: torch.ones(64, 0)}, "has rank 0, expected 1 to 512"),
        ({DOWN: torch.ones(513, 64), UP: torch.ones(64, 513)}, "has rank 513, expected 1 to 512"),
        ({DOWN: NAN}, f"{DOWN} has NaNs or infinities in it"),
        ({UP: INFINITE}, f"{UP} has NaNs or infinities in it"),
        (
            {UP: LARGER},
            f"{UP} has NaNs or infinities in it",
        ),
        ({UP: LARGE, ALPHA: ONE * 1e9}, "its scale of 2.5e+08, is not finite"),
        ({ALPHA: ONE * torch.nan}, f"{ALPHA} has NaNs or infinities in it"),
        ({ALPHA: torch.zeros(())}, f"{ALPHA} is 0, by which the LoRA would change nothing"),
        ({ALPHA: torch.ones(2)}, f"{ALPHA} has shape [2], expected one number"),
        ({ALPHA: torch.ones(0)}, f"{ALPHA} has shape [0], expected one number"),
        ({ALPHA: torch.ones(1, dtype=torch.bool)}, f"{ALPHA} is BOOL, expected one of BF16, F16"),
        ({DOWN: torch.ones(4, 64).to(torch.float8_e4m3fn)}, f"{DOWN} is F8_E4M3, expected one of"),
        ({DOWN: torch.ones(4, 64).int()}, f"{DOWN} is I32, expected one of BF16, F16, F32, F64"),
        ({DOWN: None, UP: None}, "there is no tensor in it"),
        ({UP: torch.zeros(64, 4)}, "it changes nothing: all of its factors are zero"),
        (
            {f"{Q}.lora_down.weight": torch.ones(4, 64)},
            f"{DOWN} and {Q}.lora_down.weight are of the same matrix",
        ),
        (
            {f"{Q}.lora_A.other.weight": torch.ones(4, 64)},
            f"{Q}.lora_A.other.weight and {DOWN} are of the same matrix",
        ),
        (
            {"lora_unet_blocks_0_attn_wq.alpha": ONE},
            f"lora_unet_blocks_0_attn_wq.alpha and {DOWN} are two names of one matrix",
        ),
        (
            {UP: None, "lora_unet_blocks_0_attn_wq.lora_up.weight": torch.ones(64, 4)},
            f"lora_unet_blocks_0_attn_wq.lora_up.weight and {DOWN} are two names of one matrix",
        ),
        (
            {
                f"{Q}kv.lora_A.weight": torch.ones(2, 64),
                f"{Q}kv.lora_B.weight": torch.ones(128, 2),
            },
            "are of the same rows of a matrix",
        ),
    ],
)
def test_factors_that_do_not_fit_are_named(change, message, tmp_path):
    tensors = {key: tensor for key, tensor in (good() | change).items() if tensor is not None}
    assert message in refusal_of(tmp_path, tensors)


@pytest.mark.parametrize("key", ["two\nlines.lora_A.weight", "x" * 100_000, "\x1b[2J.alpha"])
def test_a_hostile_key_is_one_short_line(key, tmp_path):
    refusal_of(tmp_path, good() | {key: ONE})


CONFIGS = {
    '{"r": 4}': "lora_alpha must be a number other than 0, got None",
    '{"lora_alpha": 4}': "r must be a positive integer, got None",
    '{"r": 4, "lora_alpha": 0}': "lora_alpha must be a number other than 0, got 0",
    '{"r": 4, "lora_alpha": NaN}': "lora_alpha must be a number other than 0, got nan",
    '{"r": 4, "lora_alpha": 1e999}': "lora_alpha must be a number other than 0, got inf",
    '{"r": 4, "lora_alpha": true}': "lora_alpha must be a number other than 0, got True",
    '{"r": 4, "lora_alpha": "4"}': "lora_alpha must be a number other than 0, got '4'",
    '{"r": 4.5, "lora_alpha": 4}': "r must be a positive integer, got 4.5",
    '{"r": 8, "lora_alpha": 4}': "transformer_blocks.0.attn.to_q has rank 4, PEFT's config says 8",
    '{"r": 4, "lora_alpha": 4, "use_dora": true}': "use_dora is True; only plain LoRA is read",
    '{"r": 4, "lora_alpha": 4, "fan_in_fan_out": true}': "fan_in_fan_out is True",
    '{"r": 4, "lora_alpha": 4, "peft_type": "LOKR"}': "peft_type is 'LOKR'; only 'LORA' is read",
    '{"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}': "is 'pissa_niter_4', by",
    '{"r": 4, "lora_alpha": 4, "alpha_pattern": [1]}': "alpha_pattern must be an object",
    '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+": 1}}': "'(a+)+' is no module's name",
    '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q.*": 1}}': "'to_q.*' is no module's name",
    '{"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": "x"}}': "rank_pattern: to_q must be",
    '{"r": 4, "lora_alpha": 4, "use_rslora": "no"}': "use_rslora must be true or false, got 'no'",
    "[]": "must be a JSON object",
    "{": "is no JSON: ",
    "[" * 100_000: "is no JSON: ",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:60])
def test_a_config_that_is_not_a_plain_loras_is_refused(text, tmp_path):
    save_file(good(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    said = refusal(tmp_path)
    assert CONFIGS[text] in said
    if "rank 4" not in said:
        assert said.startswith("adapter_config.json")
    # The same beside the file, if that is what is named.
    assert refusal(tmp_path / "adapter_model.safetensors") == said


def test_a_config_in_the_metadata_is_held_to_the_same(tmp_path):
    fields = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.use_dora": True}
    said = refusal_of(tmp_path, good(), lora_adapter_metadata=json.dumps(fields))
    assert said == "lora_adapter_metadata: use_dora is True; only plain LoRA is read"
    bare = {"r": 4, "lora_alpha": 4, "lora_bias": True}
    said = refusal_of(tmp_path, good(), lora_adapter_metadata=json.dumps(bare))
    assert said == "lora_adapter_metadata: lora_bias is True; only plain LoRA is read"
    said = refusal_of(tmp_path, good(), lora_adapter_metadata="{")
    assert said.startswith("lora_adapter_metadata is no JSON: ")


def test_a_folder_needs_both_of_pefts_files(tmp_path):
    assert refusal(tmp_path).startswith("the folder has no adapter_model.safetensors; if PEFT did")
    save_file(good(), tmp_path / "adapter_model.safetensors")
    assert refusal(tmp_path).startswith("the folder has no adapter_config.json")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    assert refusal(tmp_path).startswith("adapter_config.json is not UTF-8: 'utf-8' codec")
    (tmp_path / "adapter_config.json").write_text("")
    assert refusal(tmp_path) == "adapter_config.json has 0 bytes, expected 1 to 1048576"


def test_what_is_no_file_of_safetensors_is_refused(tmp_path):
    assert refusal(tmp_path / "nope.safetensors") == "there is no such file or folder"
    for ending in (".pt", ".bin", ".ckpt", ".gguf", ""):
        file = tmp_path / f"some{ending}"
        file.write_bytes(save(good()))
        assert refusal(file) == f"files of {ending or 'no ending'} are not read, only .safetensors"
    assert refusal(Path("/dev/null")) == "this is no file"
    with pytest.raises(AdapterError, match="…: it cannot be read: File name too long"):
        read_adapter(Path("x" * 5000), SMALL)
    with pytest.raises(AdapterError, match=r"adapter 'a\\nb': there is no such file or folder"):
        read_adapter(Path("a\nb"), SMALL)


def test_a_pickle_under_another_name_is_never_opened(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.rmdir, ())

    file = tmp_path / "some.safetensors"
    file.write_bytes(pickle.dumps({DOWN: Hostile()}))
    assert refusal(file) == "this is a pickle under another name; only safetensors is read"
    torch.save(good(), file)
    assert refusal(file) == "this is a pickle under another name; only safetensors is read"


def test_limits_hold_before_anything_is_read(tmp_path):
    file = tmp_path / "some.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert refusal(file) == "the file's header has 1099511627776 bytes, more than 8388608"
    save_file(good(), file)
    size = file.stat().st_size
    assert refusal(file, Limits(file_bytes=100)) == f"the file has {size} bytes, more than 100"
    assert refusal(file, Limits(rank=3)) == f"{DOWN} has rank 4, expected 1 to 3"
    save_file(good(), file, metadata={"lora_adapter_metadata": "x" * 99})
    said = "lora_adapter_metadata has 99 characters, more than 50"
    assert refusal(file, Limits(config_bytes=50)) == said


@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_never_worse(data, tmp_path_factory):
    """Cut anywhere, or with bytes of its header changed."""
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    stored = save(good() | {ALPHA: torch.tensor(2.0)})
    header = 8 + int.from_bytes(stored[:8], "little")
    if data.draw(st.booleans()):
        file.write_bytes(stored[: data.draw(st.integers(0, len(stored) - 1))])
        assert refusal(file).startswith("the file is damaged: ")
        return
    spoiled = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(spoiled)
    with refused_or_fine(file):
        read_adapter(file, SMALL)
