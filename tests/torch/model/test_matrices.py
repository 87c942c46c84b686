"""The DiT's matrices by a checkpoint's names, and changing them while they are loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from krea2_srt.errors import AdapterError
from krea2_srt.kernels.quantize import TokenFormat
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import load_dit, read_config, stored_shapes
from krea2_srt.model.layers import Linear
from krea2_srt.model.matrices import dit_matrices
from krea2_srt.model.quantization import SERVED, Quantization
from tests.comparisons import CPU
from tests.dialects import write_int8


@pytest.fixture(scope="module")
def folder(demo_model: Path) -> Path:
    return demo_model / "transformer"


@pytest.fixture(scope="module")
def config(folder: Path) -> Krea2Config:
    return read_config(folder)


class OneMore:
    """Adds 1, and remembers what it was added to, and what becomes of the sum."""

    def __init__(self) -> None:
        self.stored: list[Tensor] = []
        self.formats: list[TokenFormat | None] = []

    def added_to(self, stored: Tensor, format: TokenFormat | None) -> Tensor:
        self.stored.append(stored)
        self.formats.append(format)
        return stored.float() + 1


def test_krea_2_has_264_matrices():
    matrices = dit_matrices(Krea2Config())
    assert len(matrices) == 264
    shapes = stored_shapes(Krea2Config())
    assert {n: m.shape for n, m in matrices.items()} == {n: shapes[f"{n}.weight"] for n in matrices}


def test_they_are_all_rows_of_all_linears_once(folder, config):
    dit = load_dit(folder, CPU, torch.float32)
    parts: dict[str, list[tuple[int, int]]] = {}
    for matrix in dit_matrices(config).values():
        parts.setdefault(matrix.linear, []).append((matrix.start, matrix.stop))
    linears = {name: m for name, m in dit.named_modules() if isinstance(m, Linear)}
    assert parts.keys() == linears.keys()
    for name, linear in linears.items():
        rows = [row for start, stop in sorted(parts[name]) for row in range(start, stop)]
        assert rows == list(range(len(linear.weight))), name


def test_a_matrix_is_where_its_name_says(folder, config):
    dit = load_dit(folder, CPU, torch.float32)
    for name, matrix in dit_matrices(config).items():
        rows = dit.get_submodule(matrix.linear).weight[matrix.start : matrix.stop]
        assert torch.equal(rows, dit.weight_map()[f"{name}.weight"].view), name


@pytest.mark.parametrize("quantization", [None, Quantization("fp8")])
def test_deltas_are_added_to_what_is_stored(folder, quantization):
    names = ("transformer_blocks.1.attn.to_v.weight", "transformer_blocks.0.ff.down.weight")
    one_more = OneMore()
    plain = load_dit(folder, CPU, torch.bfloat16, quantization)
    changed = load_dit(folder, CPU, torch.bfloat16, quantization, dict.fromkeys(names, one_more))
    assert [tensor.dtype for tensor in one_more.stored] == [torch.bfloat16] * 2
    before, after = plain.weight_map(), changed.weight_map()
    for name, slot in before.items():
        same = torch.equal(slot.view.float(), after[name].view.float())
        assert same == (name not in names), name
    scale = changed.blocks[0].ff.down.scale
    down = changed.blocks[0].ff.down.weight.float() * (1 if scale is None else scale)
    (stored,) = [t for t in one_more.stored if t.shape == down.shape]
    assert (down - stored.float() - 1).abs().max() < 0.1


def test_deltas_are_told_what_the_sum_becomes(original_file, tmp_path):
    """A matrix in int8 keeps its file's rotation, and what is kept is not quantised."""
    write_int8(
        load_file(original_file),
        tmp_path / "some",
        group=64,
        chooses=lambda name, _: name.startswith("blocks.1.") and name.endswith(".wo.weight"),
    )
    asked = replace(SERVED["int8"], keep=("3.*",))
    expected: dict[str, TokenFormat | None] = {
        "transformer_blocks.1.attn.to_out.0.weight": TokenFormat(torch.int8, 64),
        "transformer_blocks.2.attn.to_out.0.weight": TokenFormat(torch.int8, 256),
        "transformer_blocks.3.attn.to_out.0.weight": None,
        "img_in.weight": None,
    }
    deltas = {name: OneMore() for name in expected}
    load_dit(tmp_path / "some", CPU, torch.bfloat16, asked, deltas)
    assert {name: delta.formats for name, delta in deltas.items()} == {
        name: [format] for name, format in expected.items()
    }


def test_a_delta_of_no_matrix_is_refused(folder, original_file):
    for path in (folder, original_file):
        with pytest.raises(AdapterError, match=r"the model has no img_out\.weight that a merged"):
            load_dit(path, CPU, torch.float32, deltas={"img_out.weight": OneMore()})
