"""krea2-demo-model, and what its checkpoint promises."""

import hashlib
from pathlib import Path

import pytest
import torch

from krea2_srt.cli.demo_model import main
from krea2_srt.demo.checkpoint import write_demo_checkpoint
from krea2_srt.demo.random_weights import RandomWeights
from tests.comparisons import PROMPT, psnr
from tests.torch.runner.test_pictures import finish, start


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(demo_model, tmp_path, capsys):
    main([str(tmp_path / "again"), "--random"])
    assert capsys.readouterr().out == f"{tmp_path / 'again'}\n"
    assert digest(tmp_path / "again") == digest(demo_model)
    write_demo_checkpoint(tmp_path / "other", RandomWeights(1))
    other = digest(tmp_path / "other")
    changed = {name.split("/")[0] for name, d in digest(demo_model).items() if other[name] != d}
    assert changed == {"transformer", "text_encoder", "vae"}


def test_it_is_small_and_complete(demo_model):
    size = sum(file.stat().st_size for file in demo_model.rglob("*") if file.is_file())
    assert size < 60e6
    parts = {p.name for p in demo_model.iterdir()}
    assert parts == {
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }
    for file in demo_model.rglob("*"):
        assert file.stat().st_mode & 0o044 == 0o044, f"{file} cannot be read by other users"


def picture(runner, prompt=PROMPT, seed=0, steps=8):
    return finish(runner, [start(runner, prompt, 256, 256, steps, seed)])[0]


def test_pictures_have_contrast(runner):
    assert (picture(runner) * 255).std() > 15


def test_pictures_have_structure(runner):
    """More than noise: neighbouring 8x8 squares are alike."""
    grey = torch.nn.functional.avg_pool2d(picture(runner).mean(0)[None, None], 8)[0, 0]
    a, b = grey[:, :-1].flatten(), grey[:, 1:].flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() > 0.2


@pytest.mark.parametrize("wrong", [{"seed": 1}, {"prompt": "a blue house"}, {"steps": 7}])
def test_a_wrong_seed_prompt_or_step_count_shows(runner, wrong):
    """Far below the 40 dB at which the tests call two pictures equal."""
    assert psnr(picture(runner), picture(runner, **wrong)) < 35


def test_a_seed_is_of_random_weights_only(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "model"), "--seed", "1"])
    assert exit_.value.code == 2
    assert "--seed: only random weights have one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").touch()
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path)])
    assert exit_.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr("krea2_srt.demo.checkpoint.write_tokenizer", fail)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "krea-2-demo")])
    assert not list(tmp_path.iterdir())
