"""Loading weights: shards, strictness, damage and memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.dit_files import dit_config, load_dit
from tests.comparisons import CPU

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def transformer(demo_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "transformer"
    shutil.copytree(demo_model / "transformer", folder)
    return folder


def shard(folder: Path, parts: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for part in range(parts):
        names = sorted(tensors)[part::parts]
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path):
    return load_dit(folder, CPU, torch.float32)


def test_shards_load_like_one_file(transformer, demo_model):
    shard(transformer, 3)
    whole = load(demo_model / "transformer").state_dict()
    for name, tensor in load(transformer).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_every_weight_is_filled_from_its_tensor(demo_model):
    dit = load(demo_model / "transformer")
    stored = load_file(demo_model / "transformer" / WEIGHTS)
    weight_map = dit.weight_map()
    assert weight_map.keys() == stored.keys()
    for name, slot in weight_map.items():
        expected = stored[name].float() + (1 if "norm" in name else 0)
        assert torch.equal(slot.view, expected.view(slot.view.shape)), name
    filled = sum(slot.view.numel() for slot in weight_map.values())
    assert filled == sum(p.numel() for p in dit.parameters())


def test_a_missing_tensor_is_named(transformer):
    change(transformer, lambda t: t.pop("transformer_blocks.2.attn.to_k.weight"))
    with pytest.raises(CheckpointError, match=r"missing.*transformer_blocks\.2\.attn\.to_k"):
        load(transformer)


def test_an_extra_tensor_is_named(transformer):
    change(transformer, lambda t: t.update(surprise=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"unexpected.*surprise"):
        load(transformer)


def test_a_misshapen_tensor_is_named_with_both_shapes(transformer):
    def edit(tensors):
        tensors["img_in.weight"] = tensors["img_in.weight"][:, :32].contiguous()

    change(transformer, edit)
    with pytest.raises(CheckpointError, match=r"img_in\.weight.*\[256, 32\].*\[256, 64\]"):
        load(transformer)


def test_shapes_that_do_not_fit_the_config_are_named(transformer):
    config = json.loads((transformer / "config.json").read_text())
    (transformer / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(CheckpointError, match=r"ff\.\w+\.weight has shape"):
        load(transformer)


def test_a_truncated_file_is_named(transformer):
    file = transformer / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(transformer)


def test_a_missing_shard_is_named(transformer):
    shard(transformer, 3)
    (transformer / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is missing"):
        load(transformer)


def test_an_index_cannot_point_out_of_its_folder(transformer):
    shard(transformer, 2)
    index_file = transformer / f"{WEIGHTS}.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["img_in.weight"] = "../../secret.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(transformer)


def test_a_file_has_the_config_that_lies_beside_it(transformer):
    """RoPE's base and the norms' epsilon leave no trace in a tensor."""
    file, beside = transformer / WEIGHTS, transformer / "config.json"
    config = json.loads(beside.read_text()) | {"rope_theta": 500.0, "norm_eps": 1e-3}
    beside.write_text(json.dumps(config))
    assert dit_config(file) == dit_config(transformer)
    assert load(file).config == dit_config(transformer)
    beside.write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    assert dit_config(file).rope_theta == 1000.0  # another model's


def test_an_original_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "turbo.safetensors"
    save_file({"some.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="not a Krea 2 checkpoint"):
        load(file)


_MEASURE = """
import re, sys, threading, torch
from pathlib import Path
from krea2_srt.model.dit_files import dit_config, load_dit
from krea2_srt.read_ahead import begin, finish
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, seen, loaded = anonymous(), [], threading.Event()
def watch():
    while not loaded.wait(0.002):
        seen.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
folder = Path(sys.argv[1])
begin(sorted(folder.glob("*.safetensors")))
dit = load_dit(folder, torch.device("cpu"), torch.bfloat16)
report = finish()
loaded.set()
watcher.join()
model = sum(p.nbytes for p in dit.parameters()) / 2**20
print(max(seen) - before, model, report.bytes_read / 2**20)
"""


def write_zeros(folder: Path, **config: int) -> None:
    """A transformer whose text fusion is small."""
    from krea2_srt.model.config import Krea2Config
    from krea2_srt.model.dit_files import config_dict, stored_shapes

    whole = Krea2Config(
        **config,
        text_hidden_dim=128,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=256,
    )
    (folder / "config.json").write_text(json.dumps(config_dict(whole)))
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in stored_shapes(whole).items()}
    save_file(tensors, folder / WEIGHTS)


def measure_loading(folder: Path) -> tuple[float, float]:
    """Most anonymous memory that loading has taken, and the model's own, in MiB.

    What is mapped of the files, and what has been read ahead of them, the kernel takes back when
    it needs to.
    """
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    peak, model, read = map(float, output.split())
    assert read > 0.99 * model
    return peak, model


@pytest.mark.slow
def test_loading_takes_at_most_one_shard_above_the_model(tmp_path):
    write_zeros(
        tmp_path,
        num_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=4096,
    )
    shard(tmp_path, 4)
    largest_shard = max(f.stat().st_size for f in tmp_path.glob("*.safetensors")) / 2**20
    peak, model = measure_loading(tmp_path)
    assert model > 250, "too small to tell a second copy from noise"
    assert peak <= model + largest_shard + 40


@pytest.mark.slow
def test_a_file_of_two_gigabytes_takes_no_memory_of_its_own(tmp_path):
    write_zeros(
        tmp_path,
        num_layers=9,
        num_attention_heads=24,
        num_key_value_heads=6,
        intermediate_size=8192,
    )
    peak, model = measure_loading(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert model > 1900
    # A tensor or two beside the model.
    assert peak <= model + 256
