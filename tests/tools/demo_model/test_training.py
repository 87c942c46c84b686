"""The parts of the recipe that makes the demo's weights, and how these come into a checkpoint."""

import json
from random import Random

import pytest
import torch
from torch import nn

from krea2_srt.demo.checkpoint import DIT_CONFIG, write_demo_checkpoint
from krea2_srt.demo.trained_weights import TrainedWeights
from krea2_srt.errors import CheckpointError
from tools.demo_model.autoencoder import decode, encode, new_autoencoder, scenes
from tools.demo_model.dataset import Batch, pad
from tools.demo_model.diffusion import Trainer, draw, loss_of, new_dit, velocity
from tools.demo_model.evaluate import Painter, draw_wishes
from tools.demo_model.muon import Muon, orthogonal
from tools.demo_model.shipping import rounded, tensors_of, write_weights


def examples(count: int = 6) -> Batch:
    torch.manual_seed(5)
    features, mask = pad([torch.randn(4 + number, 64) for number in range(count)])
    return Batch(features, mask, torch.randn(count, 4, 64), 2, 2)


@pytest.mark.parametrize("shape", [(2, 24, 48), (3, 16, 40), (1, 40, 16)])
def test_orthogonal_matrices_have_singular_values_of_about_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices)
    assert found.shape == matrices.shape
    assert 0.5 < torch.linalg.svdvals(found).min() <= torch.linalg.svdvals(found).max() < 1.4
    assert ((found * matrices).sum((1, 2)) > 0).all()  # and point where they did


def test_muon_goes_down():
    torch.manual_seed(0)
    wanted = torch.randn(8, 12)
    same, other = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([same, other], lr=0.1)
    for _ in range(100):
        loss = (same - wanted).square().mean() + (other - wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * 2 * wanted.square().mean()


def test_a_new_dit_answers_with_what_it_is_given():
    torch.manual_seed(0)
    trainer = Trainer(new_dit(DIT_CONFIG))
    batch = examples()
    with torch.no_grad():
        found = velocity(trainer.dit, batch, batch.tokens, torch.ones(len(batch.tokens)))
    assert torch.cosine_similarity(found.flatten(), batch.tokens.flatten(), dim=0) > 0.9


def test_training_learns_and_leaves_the_text_fusion_alone():
    torch.manual_seed(0)
    dit = new_dit(DIT_CONFIG)
    before = {name: it.clone() for name, it in dit.state_dict().items() if "fusion" in name}
    trainer, batch = Trainer(dit), examples()
    generator, no_prompt = torch.Generator().manual_seed(0), torch.zeros(5, 64)
    losses = []
    for _ in range(40):
        loss = loss_of(trainer.dit, batch, generator, no_prompt)
        trainer.step(loss, 1.0)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = trainer.finished().state_dict()
    assert before.keys() == {name for name in after if "fusion" in name}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_a_caption_draws_the_same_in_company_of_longer_ones():
    torch.manual_seed(0)
    trainer = Trainer(new_dit(DIT_CONFIG))
    captions = [torch.randn(5, 64), torch.randn(9, 64)]
    alone = draw(trainer.dit, captions[:1], 2, 3, seed=1)
    together = draw(trainer.dit, captions, 2, 3, seed=1)
    assert alone.shape == (1, 6, 64)
    torch.testing.assert_close(together[:1], alone, rtol=2e-2, atol=2e-2)


def test_pictures_are_looked_at_in_sizes_that_have_room():
    asked = draw_wishes(40, Random(0), held_out=True)
    assert all(wish.held_out for wish, _ in asked)
    painted = []

    class Painted(Painter):
        def paint(self, dit, prompts, width, height, seed):
            painted.append((width, height, list(prompts)))
            return scenes_of(prompts, width, height)

    by_text = {text: wish for wish, text in asked}

    def scenes_of(prompts, width, height):
        assert all(by_text[text].fits(width, height) for text in prompts)
        return [by_text[text].grant(width, height, Random(1)).draw() for text in prompts]

    score = Painted(lambda prompts: [], None).score(nn.Identity(), asked, [(64, 64), (256, 256)])
    assert score.colour == score.background == 1
    assert sum(len(prompts) for *_, prompts in painted) == 40
    assert {(width, height) for width, height, _ in painted} == {(64, 64), (256, 256)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A DiT, a VAE and their file, as the recipe writes it, but not trained."""
    torch.manual_seed(3)
    dit, vae = rounded(new_dit(DIT_CONFIG)), rounded(new_autoencoder())
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    latents = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    write_weights(file, tensors_of(dit, vae), {"recipe": 1, "vae_config": latents})
    return dit, vae, file


def test_the_checkpoint_has_the_weights_that_were_trained(trained, tmp_path):
    from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel

    dit, vae, file = trained
    assert file.stat().st_size < 15e6
    write_demo_checkpoint(tmp_path / "model", TrainedWeights(file))
    loaded = Krea2Transformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor.float(), dit.state_dict()[name], rtol=0, atol=0)
    released = AutoencoderKLQwenImage.from_pretrained(tmp_path / "model" / "vae")
    assert released.config.latents_std == [2.0] * 16
    pixels = scenes(Random(0), 64, 64, 1)
    with torch.no_grad():
        latents = encode(vae, pixels)
        theirs = released.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(theirs, latents, rtol=1e-3, atol=1e-3)
        drawn = released.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
        torch.testing.assert_close(drawn, decode(vae, latents).clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_weights_that_are_damaged_are_refused(trained, tmp_path):
    *_, file = trained
    copy = tmp_path / file.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    about = file.with_suffix(".json")
    copy.with_suffix(".json").write_bytes(about.read_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        TrainedWeights(copy)
    copy.with_suffix(".json").write_text(json.dumps({"recipe": 1}))
    with pytest.raises(CheckpointError, match="sha256"):
        TrainedWeights(copy)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TrainedWeights(tmp_path / "missing.safetensors")
