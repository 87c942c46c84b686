"""krea2-generate as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_srt.cli.generate import main
from krea2_srt.model.pixels import to_uint8
from krea2_srt.threads import SPIN_COUNT, VARIABLES
from tests.comparisons import PROMPT, psnr
from tests.conftest import clone_checkpoint
from tests.torch.runner.test_pictures import finish, start


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_it_generates_what_the_runner_generates(folder, demo_model, runner, capsys):
    size = ["--width", "120", "--height", "160"]
    count = ["--steps", "4", "--seed", "7", "--num-images", "2", "--output", "fox"]
    main([PROMPT, "--checkpoint", str(demo_model), "--dtype", "float32", *size, *count])
    shown = capsys.readouterr()
    assert shown.out.split() == ["fox_0.png", "fox_1.png"]
    assert "120x160 is generated as 128x160" in shown.err
    for i in range(2):
        (expected,) = finish(runner, [start(runner, PROMPT, 128, 160, 4, 7 + i)])
        assert np.array_equal(pixels(folder / f"fox_{i}.png"), to_uint8(expected))
    assert len(list(folder.iterdir())) == 2


def test_torch_is_loaded_after_it_is_decided_how_threads_wait(folder):
    """libgomp says what it has read when it was loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "krea2_srt.cli.generate", "x", "--checkpoint", "missing"],
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr


@pytest.mark.slow
def test_the_size_is_the_checkpoints_where_none_is_given(folder, trained_model, capsys):
    flags = ["--checkpoint", str(trained_model), "--steps=1", "--dtype=float32"]
    main(["a red heart", *flags])
    assert pixels(folder / "sample_0.png").shape[:2] == (256, 256)
    main(["a red heart", *flags, "--height=64"])
    assert pixels(folder / "sample_0.png").shape[:2] == (64, 256)


@pytest.mark.slow
def test_an_original_file_generates_the_same(folder, demo_model, original_file):
    common = ["--width", "64", "--height", "64", "--dtype", "float32"]
    parts = ["--text-encoder", str(demo_model / "text_encoder"), "--vae", str(demo_model / "vae")]
    main(["x", "--checkpoint", str(original_file), *parts, *common, "--output", "a"])
    main(["x", "--checkpoint", str(demo_model), *common, "--output", "b"])
    assert np.array_equal(pixels(folder / "a_0.png"), pixels(folder / "b_0.png"))


def test_a_folder_without_some_of_its_parts_says_which_flags_to_give(folder, demo_model, capsys):
    clone_checkpoint(demo_model, folder / "krea-2")
    for part in ("text_encoder", "vae"):
        (folder / "krea-2" / part).unlink()
    with pytest.raises(SystemExit) as exit_:
        main(["x", "--checkpoint", "krea-2"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "krea-2 has no text_encoder/ and no vae/; give --text-encoder and --vae (" in line


def test_a_recipe_may_be_a_variable(folder, demo_model, capsys, monkeypatch):
    clone_checkpoint(demo_model, folder / "krea-2", is_distilled=None)
    with pytest.raises(SystemExit):
        main(["x", "--checkpoint", "krea-2"])
    assert "give --recipe turbo or --recipe raw" in capsys.readouterr().err
    # Which one it is shows in what has no effect on it.
    monkeypatch.setenv("KREA2_SRT_RECIPE", "turbo")
    with pytest.raises(SystemExit):
        main(["x", "--checkpoint", "krea-2", "--y1", "0.4"])
    assert "--y1: has no effect on Turbo" in capsys.readouterr().err


@pytest.mark.slow
def test_guidance_prompt_file_and_mu(folder, raw_demo_model, load_diffusers):
    (folder / "prompt.txt").write_text("ein blaues Haus\n", encoding="utf-8")
    common = ["--checkpoint", str(raw_demo_model), "--dtype", "float32", "--width", "64"]
    common += ["--height", "64", "--prompt-file", "prompt.txt", "--steps", "5", "--cfg", "2.5"]
    main([*common, "--output", "plain"])
    main([*common, "--output", "shifted", "--y1", "0.9", "--y2", "1.4"])
    main([*common, "--output", "pinned", "--mu", "1.15"])
    pictures = [pixels(folder / f"{name}_0.png") for name in ("plain", "shifted", "pinned")]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    expected = load_diffusers(raw_demo_model, torch.float32)(
        "ein blaues Haus",
        width=64,
        height=64,
        num_inference_steps=5,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.abs(pictures[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1


BAD = [
    (["--cfg", "nan"], "--guidance-scale: must be a finite number"),
    (["--steps", "0"], "--steps: must be between 1 and 200"),
    (["--width", "0"], "--width: must be between"),
    (["--height", "-5"], "--height: must be between"),
    (["--width", "100000"], "--width: must be between"),
    (["--width", "4096", "--height", "4096"], "--width: 4096x4096 has 16777216 pixels"),
    (["--mu", "inf"], "--mu: must be a finite number"),
    (["--y1", "nan"], "--y1: must be a finite number"),
    (["--seed", "-1"], "--seed: must be between"),
    (["--num-images", "0"], "--num-images: must be between"),
    (["--output", "no/such/folder/x"], "--output: folder no/such/folder does not exist"),
    (["--output", "new/"], "--output: folder new does not exist"),
    (["--prompt-file", "x.txt"], "prompt: give either a prompt or --prompt-file"),
    (["--checkpoint", "no/such/place"], "checkpoint no/such/place does not exist"),
    (["--text-encoder", "/no/such"], "--text-encoder: /no/such does not exist"),
    (["--vae", "README.md"], "--vae: README.md does not exist"),
    (["--tokenizer", "some/repo"], "--tokenizer: some/repo does not exist"),
    (["--recipe", "fast"], "argument --recipe: invalid choice: 'fast'"),
    (["--device", "toaster"], "--device: unknown device 'toaster'"),
    (["--y1", "0.4"], "--y1: has no effect on Turbo"),
    (["--y2", "0.4", "--mu", "1"], "--y2: has no effect together with --mu"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--step", "8"], "unrecognized arguments: --step"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(folder, demo_model, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(["x", "--checkpoint", str(demo_model), *arguments])
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("krea2-generate: error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not list(folder.iterdir())


def test_the_device_is_checked_before_anything_is_downloaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("krea2_srt.model.hub.download", lambda *a: pytest.fail("download"))
    with pytest.raises(SystemExit):
        main(["x", "--checkpoint", "krea/Krea-2-Turbo", "--device", "toaster"])
    assert "--device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_prompt_that_is_cut_says_so(folder, demo_model, capsys):
    main(["word " * 600, "--checkpoint", str(demo_model), "--width", "16", "--height", "16"])
    assert "its end is not read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_prompt_file(folder, demo_model, capsys, content):
    if content is not None:
        Path("prompt.txt").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main(["--checkpoint", str(demo_model), "--prompt-file", "prompt.txt"])
    assert exit_.value.code == 2
    assert "prompt.txt" in capsys.readouterr().err


def test_an_unwritable_output_folder(folder, demo_model, capsys, monkeypatch):
    # Root may write anywhere, so the answer of the system is stood in for.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit) as exit_:
        main(["x", "--checkpoint", str(demo_model), "--output", "fox"])
    assert exit_.value.code == 2
    assert "folder . is not writable" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_picture(folder, demo_model, capsys, monkeypatch):
    def full(self, file, format):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as exit_:
        main(["x", "--checkpoint", str(demo_model), "--width", "64", "--height", "64"])
    assert exit_.value.code == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_it_imports_neither_sglang_nor_diffusers():
    code = (
        "import sys, krea2_srt.runner.model_runner, krea2_srt.model.hub;"
        "from transformers import Qwen3VLTextModel;"
        "sys.exit(any(m.split('.')[0] in ('sglang', 'diffusers') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_flag_answers_at_once():
    """Before any heavy import."""
    code = (
        "import sys\n"
        "from krea2_srt.cli.generate import main\n"
        "try: main(['x', '--steps', '0'])\n"
        "except SystemExit as e: sys.exit(0 if e.code == 2 and 'torch' not in sys.modules else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_quantised_weights_generate_nearly_the_same(folder, demo_model):
    common = ["x", "--checkpoint", str(demo_model), "--width", "64", "--height", "64"]
    main([*common, "--output", "bf16"])
    main([*common, "--quantization", "fp8", "--output", "fp8"])
    a, b = (torch.from_numpy(pixels(folder / f"{name}_0.png") / 255) for name in ("bf16", "fp8"))
    assert 25 <= psnr(a, b) < 100


def test_settings_of_the_runner_are_read_from_the_environment(
    folder, demo_model, monkeypatch, capsys
):
    monkeypatch.setenv("KREA2_SRT_ATTENTION", "fa9")
    with pytest.raises(SystemExit) as ended:
        main(["x", "--checkpoint", str(demo_model), "--width", "64", "--height", "64"])
    assert ended.value.code == 2
    assert "error: KREA2_SRT_ATTENTION: must be one of auto, sdpa" in capsys.readouterr().err
    assert not list(folder.iterdir())
