"""krea2-bench quality: metrics against known values, and real pictures of two configurations."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_bench.eight_bits import FORMATS
from krea2_bench.quality import generators
from krea2_bench.quality.cases import Case
from krea2_bench.quality.generators import DiffusersGenerator, OurGenerator, parse_generator
from krea2_bench.quality.metrics import ClipError, ClipScorer, psnr, ssim
from krea2_bench.quality.pictures import DEFAULT, summarise, table
from krea2_bench.quality.sheet import contact_sheet
from krea2_srt.model.quantization import SERVED
from tests.bench.fake_server import Fake

Bench = Callable[..., int]


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights and a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 16
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **sizes, "num_hidden_layers": 1, "vocab_size": len(tokens),
            "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    return folder


def random_picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_metrics_know_equal_near_and_foreign_pictures():
    a, b = random_picture(0), random_picture(1)
    near = (a.astype(int) + np.random.default_rng(2).integers(-4, 5, a.shape)).clip(0, 255)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)
    assert psnr(a, near.astype(np.uint8)) > 35
    assert ssim(a, near.astype(np.uint8)) > 0.97
    assert psnr(a, b) < 10
    assert abs(ssim(a, b)) < 0.1


def test_clip_scores_are_cosines(clip_model: Path):
    """The same picture and prompt score the same in any company; all lie in 0 to 100."""
    scorer = ClipScorer(str(clip_model))
    pictures, prompts = [random_picture(i) for i in range(3)], ["a cat", "snow", "a cat" * 50]
    together = scorer.scores(pictures, prompts)
    alone = [scorer.scores([p], [t])[0] for p, t in zip(pictures, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-3)
    assert all(0 <= score <= 100 for score in together)


def test_a_clip_model_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(ClipError, match=f"--clip: {tmp_path}: "):
        ClipScorer(str(tmp_path))


@pytest.mark.slow
def test_configurations_generate_the_same_picture(bench: Bench, demo_model: Path, clip_model: Path):
    """float32: packed and alone are equal; Diffusers' differs by rounding."""
    flags = ["--checkpoint", str(demo_model), "--count=3", "--size=64x96", "--steps=2"]
    assert bench("quality", "ours:dtype=float32:pack=3", "ours:dtype=float32", *flags) == 0
    (packed,) = json.loads(Path("krea2-bench-quality.json").read_text())["compared"]
    assert packed["pictures"] == 3
    assert packed["equal"] == 3 or packed["psnr"]["min"] > 60
    flags += ["--clip", str(clip_model), "--output", "theirs"]
    assert bench("quality", "ours:dtype=float32", "diffusers:dtype=float32", *flags) == 0
    result = json.loads(Path("theirs.json").read_text())
    (summary,) = result["compared"]
    assert summary["equal"] == 3 or summary["psnr"]["min"] > 50
    assert summary["ssim"]["min"] > 0.999
    assert abs(summary["clip"]["median"] - result["baseline"]["clip"]["median"]) < 0.1
    assert len({row["prompt"] for row in result["pictures"]}) == 3
    with Image.open("theirs.png") as sheet:
        assert sheet.width == 816
        assert sheet.height > 3 * 256


@pytest.mark.slow
def test_int8_and_fp8_are_beside_bf16_unless_told_otherwise(bench: Bench, demo_model: Path, capsys):
    flags = ["--checkpoint", str(demo_model), "--count=2", "--size=64x64", "--steps=2"]
    assert bench("quality", *flags) == 0
    result = json.loads(Path("krea2-bench-quality.json").read_text())
    names = [its["configuration"] for its in result["compared"]]
    assert (*names, result["baseline"]["configuration"]) == DEFAULT
    int8, fp8 = (its["psnr"]["median"] for its in result["compared"])
    assert 20 < fp8 < int8 < 70
    assert [len(row["compared"]) for row in result["pictures"]] == [2, 2]
    out = capsys.readouterr().out
    assert table(result) in out
    with Image.open("krea2-bench-quality.png") as sheet:
        assert sheet.width == 12 + 5 * 268  # three pictures, two differences


def test_a_server_generates_too(bench: Bench, fake_process: Fake, tmp_path: Path):
    fake_process.script({})
    (tmp_path / "prompts").write_text("a cat\n\nsnow\n")
    flags = ["--prompts", "prompts", "--size=64x64"]
    assert bench("quality", fake_process.url, fake_process.url, *flags) == 0
    assert json.loads(Path("krea2-bench-quality.json").read_text())["compared"][0]["equal"] == 2
    seen = fake_process.statistics["seen"]
    assert [(f["prompt"], f["seed"], f["size"]) for f in seen] == [
        ("a cat", 0, "64x64"),
        ("snow", 1, "64x64"),
    ] * 2


def test_equal_pictures_have_no_psnr():
    rows = [{"psnr": math.inf, "ssim": 1.0}]
    assert summarise(rows) == {
        "pictures": 1, "equal": 1, "psnr": None, "ssim": {"min": 1.0, "median": 1.0, "max": 1.0},
    }  # fmt: skip


def test_the_table_has_all_side_by_side():
    spread = {"min": 30.0, "median": 36.123, "max": 40.0}
    compared = [
        {"configuration": "a", "equal": 0, "psnr": spread, "ssim": spread},
        {"configuration": "longer", "equal": 2, "psnr": None, "ssim": spread},
    ]
    result = {"baseline": {"configuration": "b"}, "compared": compared, "pictures": [{}, {}]}
    assert table(result).split("\n") == [
        "2 pictures against those of b",
        "        equal  PSNR, dB          SSIM",
        "a       0      36.12 (30 to 40)  36.12 (30 to 40)",
        "longer  2      -                 36.12 (30 to 40)",
    ]
    for its in (*compared, result["baseline"]):
        its["clip"] = spread
    assert table(result).split("\n")[-1].split() == ["b", "36.12", "(30", "to", "40)"]


def test_a_sheet_shows_all_and_their_differences():
    black, grey = np.zeros((256, 256, 3), np.uint8), np.full((256, 256, 3), 10, np.uint8)
    sheet = np.asarray(contact_sheet(("a", "b"), [(black, grey)], ["a caption"]))
    row = sheet[100]
    assert [tuple(row[x]) for x in (100, 400, 650)] == [(0, 0, 0), (10, 10, 10), (80, 80, 80)]
    three = np.asarray(contact_sheet(("a", "b", "c"), [(black, grey, grey)], ["a caption"]))
    assert [three[100, x, 0] for x in (100, 400, 650, 900, 1200)] == [0, 10, 10, 80, 0]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["theirs", "ours"], "'theirs' is no configuration"),
        (["ours:dtype=int4", "ours"], "dtype must be one of bfloat16, float32"),
        (["ours:pack=0", "ours"], "pack must be a whole number from 1"),
        (["ours:colour=red", "ours"], "colour is not known"),
        (["ours"], "'ours': name what it is compared to as well"),
        (["ours:quantization=fp4", "ours"], "quantization 'fp4' is not known"),
        (["ours", "ours", "--size=100x100"], "multiples of 16"),
        (["ours", "ours", "--prompts=missing"], "No such file"),
        (["ours", "ours", "--prompts=empty"], "holds no prompt"),
        (["ours", "ours", "--clip=missing"], "--clip: missing: "),
        (["ours", "ours", "--checkpoint=missing"], "missing"),
    ],
)
def test_what_cannot_be_is_one_line(bench: Bench, capsys, flags: list[str], error: str):
    Path("empty").write_text("\n")
    assert bench("quality", *flags) == 2
    found = capsys.readouterr().err.strip().splitlines()
    assert error in found[-1]
    assert not Path("krea2-bench-quality.json").exists()


def test_configurations_are_parsed(tmp_path: Path):
    assert isinstance(parse_generator("diffusers:dtype=float32", tmp_path), DiffusersGenerator)
    for name in FORMATS:
        configuration = f"ours:quantization={name}:pack=4"
        assert isinstance(parse_generator(configuration, tmp_path), OurGenerator)
    assert all(configuration.split("=")[-1] in (*SERVED, "ours") for configuration in DEFAULT)


def test_diffusers_gets_the_noise_of_the_device_that_it_runs_on(monkeypatch, tmp_path: Path):
    """As our runner does: a CPU's noise on a GPU would compare two different pictures."""
    devices: list[object] = []

    class Pipeline:
        def to(self, device: object) -> "Pipeline":
            devices.append(device)
            return self

        def set_progress_bar_config(self, **_: object) -> None: ...

        def __call__(self, *_: object, generator: object, **__: object) -> SimpleNamespace:
            devices.append(generator)
            return SimpleNamespace(images=[Image.new("RGB", (16, 16))])

    class Generator:
        def __init__(self, device: object) -> None:
            devices.append(device)

        def manual_seed(self, seed: int) -> object:
            return ("generator", devices[-1], seed)

    monkeypatch.setattr("diffusers.Krea2Pipeline.from_pretrained", lambda *_, **__: Pipeline())
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(generators, "_device", lambda: "a GPU")
    list(DiffusersGenerator(tmp_path, "float32").generate([Case("x", 5, 16, 16, 1)]))
    assert devices == ["a GPU", "a GPU", ("generator", "a GPU", 5)]
