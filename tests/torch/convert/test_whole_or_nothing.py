"""What a conversion leaves behind that does not come to its end, and how much it takes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import krea2_srt.convert.plan as plan_module
from krea2_srt.convert.convert import convert_to_file, convert_to_folder
from krea2_srt.convert.tensor_file import TensorFile
from krea2_srt.errors import CheckpointError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A name in an empty folder."""
    return tmp_path / "outputs" / "krea-2-new"


@pytest.fixture(autouse=True)
def folder(out: Path) -> Path:
    out.parent.mkdir()
    return out.parent


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("I/O error"), CheckpointError("x")])
def test_an_interruption_leaves_nothing(checkpoint, out, folder, error, monkeypatch):
    write = TensorFile.write

    def interrupted(self, name, tensor):
        if "blocks.2.ff.up" in name:
            assert [path.name for path in folder.iterdir()] != []
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(TensorFile, "write", interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        convert_to_folder(checkpoint, out)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_under_the_name(demo_model, out, folder):
    code = (
        "import os, signal, sys, krea2_srt.convert.plan as plan\n"
        "plan.check_tensors = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from krea2_srt.cli.convert import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(demo_model), str(out)])
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name.startswith(".krea-2-new.")


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_a_disk_that_has_something_else_is_noticed(checkpoint, out, folder, name, monkeypatch):
    def damaged(check):
        def run(path, *more):
            if path.parent.name == name and path.suffix == ".safetensors":
                data = bytearray(path.read_bytes())
                data[-100] ^= 1
                path.write_bytes(data)
            check(path, *more)

        return run

    for check in ("check_tensors", "check_file"):
        monkeypatch.setattr(plan_module, check, damaged(getattr(plan_module, check)))
    with pytest.raises(OSError, match=r"\.safetensors is not on the disk as it was written"):
        convert_to_folder(checkpoint, out)
    assert list(folder.iterdir()) == []


def test_a_damaged_header_is_noticed(checkpoint, out, folder, monkeypatch):
    check = plan_module.check_tensors

    def run(path, *more):
        data = path.read_bytes()
        path.write_bytes(data[:-8])
        check(path, *more)

    monkeypatch.setattr(plan_module, "check_tensors", run)
    with pytest.raises(OSError, match="not on the disk as it was written"):
        convert_to_file(checkpoint.transformer, checkpoint.sampling, out)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(checkpoint, out, kind):
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"krea-2-new exists already"):
        convert_to_folder(checkpoint, out)
    assert os.path.lexists(out)


def test_a_name_that_could_not_be_read_back_is_told_before(checkpoint, folder):
    with pytest.raises(OSError, match=r"krea-\\udcff': the path must be UTF-8"):
        convert_to_folder(checkpoint, folder / "krea-\udcff")
    assert list(folder.iterdir()) == []


def test_what_came_in_the_meantime_is_not_overwritten(checkpoint, out, folder, monkeypatch):
    check = plan_module.check_tensors

    def run(path, *more):
        out.write_text("precious")
        check(path, *more)

    monkeypatch.setattr(plan_module, "check_tensors", run)
    with pytest.raises(FileExistsError):
        convert_to_file(checkpoint.transformer, checkpoint.sampling, out)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
        ("krea-2-new", "precious")
    ]


def test_a_disk_that_is_too_small_is_told_before(checkpoint, out, folder, monkeypatch):
    usage = type("Usage", (), {"free": 10**7})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(plan_module.Plan, "write", lambda *a: pytest.fail("written"))
    with pytest.raises(OSError, match=r"krea-2-new needs 0\.05 GB, and folder .* has 0\.01 GB"):
        convert_to_folder(checkpoint, out)
    assert list(folder.iterdir()) == []


def test_progress_goes_to_the_end(checkpoint, out):
    told: list[tuple[int, int]] = []
    convert_to_folder(checkpoint, out, on_progress=lambda *one: told.append(one))
    done, totals = [one for one, _ in told], {total for _, total in told}
    assert done == sorted(done)
    weights = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".json")]
    # Each byte is written and read back; only headers and small files are not counted.
    assert totals == {done[-1]}
    assert 0 <= 2 * sum(path.stat().st_size for path in weights) - done[-1] < 10**5


_MEASURE = """
import re, sys
from pathlib import Path
from krea2_srt.convert.convert import convert_to_file
from krea2_srt.model.checkpoint import SamplingDefaults
from krea2_srt.model.quantization import SERVED
def megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, peak = megabytes(), 0.0
def on_progress(done, total):
    global peak
    peak = max(peak, megabytes())
quantization = SERVED.get(sys.argv[3])
convert_to_file(
    Path(sys.argv[1]), SamplingDefaults(True), Path(sys.argv[2]), quantization, on_progress
)
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_it_takes_little_memory_above_that_of_one_tensor(out, quantization, tmp_path):
    import torch
    from safetensors.torch import save_file

    from krea2_srt.model.config import Krea2Config
    from krea2_srt.model.dit_files import stored_shapes

    config = Krea2Config(
        num_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=8192,
        text_hidden_dim=128,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=256,
    )
    zeros = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in stored_shapes(config).items()}
    file = tmp_path / "turbo.safetensors"
    save_file(zeros, file)
    assert file.stat().st_size > 1e9
    largest = max(tensor.nbytes for tensor in zeros.values()) / 2**20
    del zeros
    code = [sys.executable, "-c", _MEASURE, str(file), str(out), quantization]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert float(done.stdout) < largest + 300
