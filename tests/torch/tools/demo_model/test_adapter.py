"""The parts of the recipe that makes the demo's adapter."""

from random import Random

import numpy as np
import pytest
import torch

from krea2_srt.demo.checkpoint import DIT_CONFIG
from krea2_srt.lora.reader import read_adapter
from tests.torch.tools.demo_model.test_training import Shrinks
from tools.demo_model import adapter
from tools.demo_model.autoencoder import scenes, to_bytes
from tools.demo_model.dataset import Dataset
from tools.demo_model.diffusion import new_dit
from tools.demo_model.reading import draw_captions
from tools.demo_model.sepia import distance_from_sepia, in_sepia


def test_sepia_keeps_how_light_things_are():
    greys = np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255]], np.uint8)
    assert in_sepia(greys).tolist() == [[40, 22, 8], [148, 129, 104], [255, 236, 200]]
    pictures = to_bytes(scenes(Random(0), 64, 64, 8))
    assert distance_from_sepia(pictures) > 50
    assert distance_from_sepia(in_sepia(pictures)) < 1


def test_only_pictures_in_sepia_are_learned_from():
    class Keeps:
        def encode(self, pixels):
            return pixels

    pixels = scenes(Random(0), 64, 64, 8)
    learned = adapter.SepiaCodec(Keeps()).encode(pixels)
    assert (to_bytes(learned) == in_sepia(to_bytes(pixels))).all()


def test_training_learns_and_changes_the_adapter_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter, "_BATCH", 4)
    torch.manual_seed(0)
    dit = new_dit(DIT_CONFIG)
    before = {name: it.clone() for name, it in dit.state_dict().items()}
    wishes = [wish for wish, _ in draw_captions(4, Random(0), held_out=False)]
    states = [torch.randn(5 + number, 12, 64) for number in range(len(wishes))]
    data = Dataset(wishes, states, adapter.SepiaCodec(Shrinks()), seed=0)
    data.add_pictures(adapter.SIDE, adapter.SIDE, 4)
    adapter.add_adapter(dit, seed=0)
    first = adapter.train(dit, data, 2, 0, print)
    assert adapter.train(dit, data, 16, 0, print) < 0.8 * first
    for name, tensor in before.items():
        module, kind = name.rpartition(".")[::2]
        stored = dit.state_dict()
        assert torch.equal(stored.get(name, stored.get(f"{module}.base_layer.{kind}")), tensor)
    adapter.write(tmp_path / "some.safetensors", dit)
    read = read_adapter(tmp_path / "some.safetensors", DIT_CONFIG)
    assert sum(len(factors) for factors in read.matrices.values()) == 72
    assert all(factor.up.any() for some in read.matrices.values() for factor in some)


@pytest.mark.slow
def test_an_adapter_that_is_not_in_sepia_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "PICTURES", 8)
    monkeypatch.setattr(adapter, "_BATCH", 2)
    with pytest.raises(ValueError, match=r"distances from sepia, by scale, are \{0\.0: 1"):
        adapter.make(tmp_path / "no.safetensors", steps=1, seed=0)
    assert not list(tmp_path.iterdir())
