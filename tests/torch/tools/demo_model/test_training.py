"""The parts of the recipe that makes the demo's weights, and how these come into a checkpoint."""

import copy
import json
from functools import partial
from random import Random

import pytest
import torch
from torch import nn

from krea2_srt.demo.checkpoint import DIT_CONFIG, write_demo_checkpoint
from krea2_srt.demo.trained_weights import TrainedWeights
from krea2_srt.errors import CheckpointError
from tools.demo_model import autoencoder
from tools.demo_model.__main__ import _kept, _text_encoder
from tools.demo_model.autoencoder import decode, encode, new_autoencoder, scenes, shrunk
from tools.demo_model.dataset import Batch, Dataset, pad
from tools.demo_model.diffusion import Trainer, draw, loss_of, new_dit, velocity
from tools.demo_model.evaluate import ImageGenerator
from tools.demo_model.guide import answers, wrong
from tools.demo_model.muon import Muon, orthogonal
from tools.demo_model.reading import _QUESTIONS, _answers, by_layer, draw_captions, fuse, train
from tools.demo_model.scene import COLOURS, STYLES, Scene, Thing
from tools.demo_model.shapes import SHAPES
from tools.demo_model.shipping import load_vae, rounded, tensors_of, write_weights
from tools.demo_model.wish import Asked, Wish


def examples(count: int = 6) -> Batch:
    torch.manual_seed(5)
    features, mask = pad([torch.randn(4 + number, 64) for number in range(count)])
    names = torch.arange(count)[:, None, None].expand(count, 4, 3) % 4
    answers = torch.cat([names.float(), torch.zeros(count, 4, 2)], dim=-1)
    return Batch(features, mask, torch.randn(count, 4, 64), answers, 2, 2)


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
    kernel = nn.Parameter(torch.zeros(8, 3, 2, 2))  # of a convolution: a matrix of 8 x 12
    optimizer = Muon([same, other, kernel], lr=0.1)
    for _ in range(100):
        loss = (same - wanted).square().mean() + (other - wanted.T).square().mean()
        loss = loss + (kernel - wanted.view(8, 3, 2, 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * 3 * wanted.square().mean()


def test_a_new_dit_answers_with_what_it_is_given():
    torch.manual_seed(0)
    trainer = Trainer(new_dit(DIT_CONFIG))
    batch = examples()
    with torch.no_grad():
        found = velocity(trainer.guided.dit, batch, batch.tokens, torch.ones(len(batch.tokens)))
    assert torch.cosine_similarity(found.flatten(), batch.tokens.flatten(), dim=0) > 0.9


@pytest.mark.slow
def test_training_learns_and_leaves_the_text_fusion_alone():
    torch.manual_seed(0)
    dit = new_dit(DIT_CONFIG)
    before = {name: it.clone() for name, it in dit.state_dict().items() if "fusion" in name}
    trainer, batch = Trainer(dit), examples()
    generator, no_prompt = torch.Generator().manual_seed(0), torch.zeros(5, 64)
    losses = []
    for _ in range(40):
        loss, unsure, _ = loss_of(trainer.guided, batch, generator, no_prompt)
        trainer.step(loss + 0.1 * unsure, 1.0)
        losses.append(torch.stack([loss, unsure]).detach())
    first, last = (torch.stack(some).mean(0) for some in (losses[:5], losses[-5:]))
    assert (last < 0.9 * first).all()
    after = trainer.finished().state_dict()
    assert before.keys() == {name for name in after if "fusion" in name}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_a_caption_draws_the_same_in_company_of_longer_ones():
    torch.manual_seed(0)
    trainer = Trainer(new_dit(DIT_CONFIG))
    captions = [torch.randn(5, 64), torch.randn(9, 64)]
    alone = draw(trainer.average, captions[:1], 2, 3, seed=1)
    together = draw(trainer.average, captions, 2, 3, seed=1)
    assert alone.shape == (1, 6, 64)
    torch.testing.assert_close(together[:1], alone, rtol=2e-2, atol=2e-2)


def test_pictures_are_looked_at_in_sizes_that_have_room():
    asked = draw_captions(40, Random(0), held_out=True)
    assert all(wish.held_out for wish, _ in asked)
    painted = []

    class Painted(ImageGenerator):
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


def test_training_goes_on_where_it_was_interrupted():
    torch.manual_seed(0)
    first, batch, no_prompt = Trainer(new_dit(DIT_CONFIG)), examples(), torch.zeros(5, 64)
    second = Trainer(new_dit(DIT_CONFIG))

    def step(trainer: Trainer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        error, unsure, _ = loss_of(trainer.guided, batch, generator, no_prompt)
        trainer.step(error + unsure, 1.0)

    for seed in range(3):
        step(first, seed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for trainer in (first, second):
        step(trainer, 3)
    assert first.steps == second.steps == 4
    for name, tensor in first.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], tensor)


@pytest.mark.slow
def test_text_fusion_learns_to_say_what_a_caption_asks():
    torch.manual_seed(0)
    fusion = new_dit(DIT_CONFIG).text_fusion
    captions = draw_captions(400, Random(0), held_out=False)
    states = by_layer(fusion, _text_encoder().encode([text for _, text in captions]))
    across = {name: it.clone() for name, it in fusion.layerwise_blocks.state_dict().items()}
    right = train(fusion, [wish for wish, _ in captions], states, 0, 160, print)
    assert right > 0.01  # of tokens that had not been seen; by chance one in 10^8
    for name, tensor in fusion.layerwise_blocks.state_dict().items():
        torch.testing.assert_close(tensor, across[name], rtol=0, atol=0)
    # One by one or padded together, and by the module itself: all the same.
    together, alone = fuse(fusion, states[:8]), fuse(fusion, states[3:4])
    torch.testing.assert_close(together[3], alone[0], rtol=1e-4, atol=1e-4)
    hidden_states = _text_encoder().encode([captions[3][1]])[0]
    with torch.no_grad():
        torch.testing.assert_close(fusion(hidden_states[None])[0], alone[0], rtol=1e-4, atol=1e-4)


def test_the_last_tokens_speak_of_one_thing_each_in_the_order_of_the_picture():
    red, blue = Asked("star", "red"), Asked("ring", "blue")
    answers = {
        relation: _answers(Wish(("white",), (red, blue), relation))
        for relation in ("and", "left of", "right of", "above", "below")
    }
    colours = len(_QUESTIONS) + 1  # of one thing: its shape, then its colour
    for relation, tokens in answers.items():
        order = (blue, red) if relation in ("right of", "below") else (red, blue)
        said = [its[colours] for its in tokens]
        first, last = (1 + list(COLOURS).index(it.colour) for it in order)
        assert said == [first, last, first, last, first, 0]  # from the end; 0 is none
    assert answers["left of"] == answers["and"] != answers["above"]


def test_image_tokens_are_to_know_which_thing_they_are_part_of():
    things = (
        Thing("star", "red", "plain", x=24, y=40, radius=20),
        Thing("ring", "blue", "outline", x=88, y=40, radius=20),
    )
    right = answers(Scene(112, 80, ("white",), things)).view(5, 7, 5)
    star, ring = (1 + list(SHAPES).index(it) for it in ("star", "ring"))
    assert right[2, 1, 0] == star
    assert right[2, 5, 0] == ring
    assert (right[2, 5, :3] > 0).all()
    assert right[2, 5, 2] != right[2, 1, 2]
    assert (right[2, 3] == 0).all()  # between them
    assert (right[0] == 0).all()  # and above
    # The patch at 80 to 96 across and 32 to 48 down has the ring's middle in its own.
    torch.testing.assert_close(right[2, 5, 3:], torch.zeros(2))
    torch.testing.assert_close(right[1, 5, 3:], torch.tensor([0.0, -16 / 20]))


def test_what_is_wrong_is_counted_for_every_answer():
    right = answers(Scene(64, 64, ("white",), (Thing("star", "red", "plain", 32, 32, 20),)))[None]
    classes = (len(SHAPES) + 1, len(COLOURS) + 1, len(STYLES) + 1)
    sure = [
        100.0 * nn.functional.one_hot(right[..., number].long(), count)
        for number, count in enumerate(classes)
    ]
    told = torch.cat([*sure, right[..., 3:]], dim=-1)[None]
    loss, knows = wrong(told, right)
    assert loss < 1e-6
    assert knows == 1
    for at in (0, classes[0], sum(classes[:2])):  # all say "none" of the shape, colour, style
        worse = told.clone()
        worse[..., at] += 200
        assert wrong(worse, right)[0] > 1
    assert wrong(told + torch.tensor([0.0] * sum(classes) + [1.0, 0.0]), right)[0] > 0.4


@pytest.mark.slow
def test_the_vae_is_trained_until_it_is_good_or_time_is_up(monkeypatch):
    small = {"_LOOK_EVERY": 10, "_POOL": 3, "_SIDE": 64, "_COUNT": 4}
    small["psnr"] = partial(autoencoder.psnr, count=4, side=64)
    for name, value in small.items():
        monkeypatch.setattr(autoencoder, name, value)
    torch.manual_seed(0)
    vae = new_autoencoder()
    before = autoencoder.psnr(vae, Random(1))
    with pytest.raises(TimeoutError, match="dB after 0 s"):
        autoencoder.train(vae, 0, before + 3, 1e-6, False, print)
    assert autoencoder.train(vae, 0, before + 3, 600, False, print) >= before + 3
    encoder = copy.deepcopy(vae.encoder.state_dict())
    now = autoencoder.psnr(vae, Random(1))
    assert autoencoder.sharpen(vae, 0, now + 1, 600, False, print) >= now + 1
    for name, tensor in vae.encoder.state_dict().items():
        torch.testing.assert_close(tensor, encoder[name], rtol=0, atol=0)


class Shrinks:
    """A codec whose latents are the picture, smaller."""

    def encode(self, pixels):
        return nn.functional.pad(shrunk(pixels), (0, 0, 0, 0, 0, 4))  # to 16 channels


def test_each_caption_keeps_its_own_pictures():
    captions = draw_captions(40, Random(0), held_out=False)
    # Features that tell which caption they are of.
    features = [torch.full((3 + number % 5, 2), float(number)) for number in range(len(captions))]
    data = Dataset([wish for wish, _ in captions], features, Shrinks(), seed=0)
    assert data.count(96, 64) == 0
    data.add_pictures(96, 64, 50)
    assert data.count(96, 64) == 50
    batch = data.batch(96, 64, 12, Random(1))
    assert (batch.rows, batch.columns, batch.tokens.shape) == (4, 6, (12, 24, 64))
    assert batch.answers is not None
    assert batch.answers.shape == (12, 24, 5)
    assert batch.features.shape[:2] == batch.mask.shape
    for number in range(12):
        index = int(batch.features[number, 0, 0])
        assert batch.mask[number].sum() == len(features[index])
        assert (batch.features[number, batch.mask[number]] == index).all()
        wish = captions[index][0]
        shapes = {1 + list(SHAPES).index(it.shape) for it in wish.asked}
        assert set(batch.answers[number, :, 0].tolist()) == {0, *shapes}
        if len(wish.background) == 1:
            corner = batch.tokens[number, 0].view(16, 4)[:12:4, 0]  # red, green and blue
            expected = torch.tensor(COLOURS[wish.background[0]]) / 127.5 - 1
            torch.testing.assert_close(corner, expected, rtol=0, atol=0.02)


def test_what_an_earlier_run_has_made_is_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"state": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}}

    for _ in range(2):
        module = nn.Linear(2, 1)
        _kept(tmp_path / "work", "part", make, module)
        assert module.weight.tolist() == [[1, 1]]
    assert len(made) == 1
    assert _kept(None, "part", make, nn.Linear(2, 1))["seconds"] < 1
    assert len(made) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A DiT, a VAE and their file, as the recipe writes it, but not trained."""
    torch.manual_seed(3)
    dit, vae = rounded(new_dit(DIT_CONFIG)), rounded(new_autoencoder())
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    latents = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    about = {"recipe": 1, "trained_side": 256, "vae_config": latents}
    write_weights(file, tensors_of(dit, vae), about)
    return dit, vae, file


@pytest.mark.slow
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


def test_an_earlier_runs_vae_is_the_one_that_is_kept(trained):
    _, vae, file = trained
    load_vae(TrainedWeights(file), again := new_autoencoder())
    for name, tensor in vae.state_dict().items():
        if "time_conv" not in name:
            torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


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
