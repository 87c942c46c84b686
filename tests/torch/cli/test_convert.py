"""krea2-convert as a user runs it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from krea2_srt.cli.convert import main
from tests.torch.cli.test_demo_model import digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parts(model: Path) -> list[str]:
    return [f"--{p.replace('_', '-')}={model / p}" for p in ("text_encoder", "vae", "tokenizer")]


@pytest.mark.parametrize(("quantization", "error"), [("fp8", r"2\.\d{3}%"), ("int8", r"0\.\d{3}%")])
def test_a_folder_in_8_bits(folder, demo_model, capsys, quantization, error):
    main([str(demo_model), "new", "--quantization", quantization])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "new"
    said = r"transformer: 8\.69 MB before, 5\.34 MB now; tensors: 86 kept, 32 quantised"
    assert re.fullmatch(said, lines[1])
    assert lines[2] == "relative errors, by matrix (mean, worst, where):"
    errors = [re.fullmatch(rf"  (\S+) +{error}  {error}  (\S+)", line) for line in lines[3:]]
    attention = {f"attn.to_{name}" for name in ("q", "k", "v", "gate", "out.0")}
    assert {found[1] for found in errors} == attention | {"ff.gate", "ff.up", "ff.down"}
    assert all(found[2].endswith(f".{found[1]}.weight") for found in errors)
    assert {path.name for path in folder.iterdir()} == {"new"}


def test_a_file_and_back(folder, demo_model, capsys):
    main([str(demo_model), "turbo.safetensors", "--layout", "file"])
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "nothing is lost: all tensors have the same numbers"
    assert said[3].startswith("without text encoder, tokenizer, VAE and scheduler settings")
    main(["turbo.safetensors", "new", *parts(demo_model)])
    assert digest(folder / "new") == digest(demo_model)


def test_a_file_needs_no_other_parts(folder, demo_model, original_file, monkeypatch, capsys):
    monkeypatch.setattr("krea2_srt.model.hub.download", lambda *a: pytest.fail("download"))
    main([str(original_file), "new.safetensors", "--layout=file"])
    (folder / "old").mkdir()
    for entry in ("model_index.json", "transformer"):
        (folder / "old" / entry).symlink_to(demo_model / entry)
    main(["old", "of-a-folder.safetensors", "--layout=file"])
    one, other = (load_file(name) for name in ("new.safetensors", "of-a-folder.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()


def test_the_recipe_is_what_is_asked_for(folder, demo_model, original_file, capsys):
    main([str(demo_model), "raw", "--recipe", "raw"])
    assert json.loads((folder / "raw" / "model_index.json").read_text())["is_distilled"] is False
    (folder / "mine.safetensors").symlink_to(original_file)
    file = ["mine.safetensors", "new.safetensors", "--layout=file"]
    with pytest.raises(SystemExit):
        main(file)
    assert "Turbo or Raw" in capsys.readouterr().err
    main([*file, "--recipe=turbo"])


def test_the_original_codes_names_are_known(folder, original_file, monkeypatch, capsys):
    (folder / "mine.safetensors").symlink_to(original_file)
    monkeypatch.setenv("OSS_RAW", "mine.safetensors")
    main(["oss_raw", "new.safetensors", "--layout=file"])
    with safe_open(folder / "new.safetensors", framework="pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Krea 2 Raw"


def test_what_is_left_behind_is_said(folder, demo_model, capsys):
    (folder / "old").mkdir()
    for entry in demo_model.iterdir():
        if entry.name != "vae":
            (folder / "old" / entry.name).symlink_to(entry)
    (folder / "old" / "vae").mkdir()
    for entry in [*(demo_model / "vae").iterdir(), demo_model]:
        (folder / "old" / "vae" / entry.name).symlink_to(entry)
    (folder / "old" / "LICENSE.pdf").touch()
    main(["old", "new"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "not part of a checkpoint, left behind: LICENSE.pdf, vae/krea-2-demo"
    assert digest(folder / "new") == digest(demo_model)


BAD = [
    (["x.safetensors"], "argument OUT: x.safetensors would be a folder; add --layout file"),
    (["x", "--layout=file"], "argument OUT: a file's name must end in .safetensors, got x"),
    (["no/x"], "folder no does not exist"),
    (["old"], "old exists already; nothing is overwritten"),
    (["x", "--quantization=int4"], "argument --quantization: invalid choice: 'int4'"),
    (["x", "--recipe=turbo2"], "argument --recipe: invalid choice: 'turbo2'"),
    (["x", "--layout=tar"], "argument --layout: invalid choice: 'tar'"),
    (["x", "--force"], "unrecognized arguments: --force"),
    (["x", "--quant=fp8"], "unrecognized arguments: --quant=fp8"),
    ([], "the following arguments are required: OUT"),
    *(
        (
            ["x.safetensors", "--layout=file", f"--{part}=d"],
            f"argument --{part}: --layout file writes the transformer alone",
        )
        for part in ("text-encoder", "vae", "tokenizer")
    ),
]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("krea2-convert: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(folder, demo_model, capsys, arguments, message):
    (folder / "old").mkdir()
    assert message in refused(capsys, str(demo_model), *arguments)
    assert [path.name for path in folder.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("wrong", "layout"),
    [
        (wrong, layout)
        for wrong in ("missing", "truncated", "other")
        for layout in ("folder", "file")
    ]
    + [("no part", "folder")],
)
def test_an_input_that_cannot_be_read_is_named(folder, demo_model, capsys, wrong, layout):
    out = "new.safetensors" if layout == "file" else "new"
    old = folder / "old"
    if wrong != "missing":
        old.mkdir()
        for entry in demo_model.iterdir():
            if wrong != "no part" or entry.name != "vae":
                (old / entry.name).symlink_to(entry)
    if wrong in ("truncated", "other"):
        (old / "transformer").unlink()
        (old / "transformer").mkdir()
        for entry in (demo_model / "transformer").iterdir():
            data = entry.read_bytes()
            if wrong == "truncated" and entry.suffix == ".safetensors":
                data = data[:-1000]
            if wrong == "other" and entry.suffix == ".json":
                data = data.replace(b'"num_layers": 4', b'"num_layers": 5')
            (old / "transformer" / entry.name).write_bytes(data)
    message = {
        "missing": "checkpoint no/such/place does not exist",
        "truncated": "diffusion_pytorch_model.safetensors is damaged",
        "other": "tensors are missing: transformer_blocks.4.",
        "no part": "old has no vae/",
    }[wrong]
    name = "no/such/place" if wrong == "missing" else "old"
    assert message in refused(capsys, name, out, f"--layout={layout}")
    assert not (folder / out).exists()
