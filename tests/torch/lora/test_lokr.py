"""LoKr against the formula of LyCORIS, in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from krea2_srt.errors import AdapterError
from krea2_srt.lora.limits import Limits
from krea2_srt.lora.merge import merge
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.matrices import dit_matrices
from tests.comparisons import CPU, relative_error
from tests.torch.lora.test_vocabulary import SMALL

OUT, WIDTH = 96, 64  # of blocks.0.mlp.gate in the small model
GATE = "diffusion_model.blocks.0.mlp.gate"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(name: str, rows: int, columns: int, rank: int) -> dict[str, torch.Tensor]:
    return {name: random(rows, columns)}


def split(name: str, rows: int, columns: int, rank: int) -> dict[str, torch.Tensor]:
    return {f"{name}_a": random(rows, rank), f"{name}_b": random(rank, columns)}


def value(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name].double()
    return tensors[f"{name}_a"].double() @ tensors[f"{name}_b"].double()


def write(folder: Path, tensors: dict[str, torch.Tensor], module: str = GATE) -> Path:
    file = folder / "lokr.safetensors"
    save_file({f"{module}.{role}": tensor for role, tensor in tensors.items()}, file)
    return file


@pytest.mark.parametrize(("first", "second", "rank"), [(8, 4, 3), (2, 16, 5), (16, 1, 2)])
@pytest.mark.parametrize("w1", [whole, split])
@pytest.mark.parametrize("w2", [whole, split])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_lokr_is_the_kronecker_product(w1, w2, first, second, rank, alpha, tmp_path):
    tensors = w1("lokr_w1", first, second, rank)
    tensors |= w2("lokr_w2", OUT // first, WIDTH // second, rank)
    # Where neither is a product LyCORIS knows no rank, and does not scale.
    scale = alpha / rank if alpha and (w1 is split or w2 is split) else 1.0
    expected = scale * torch.kron(value(tensors, "lokr_w1"), value(tensors, "lokr_w2"))
    if alpha:
        tensors["alpha"] = torch.tensor(alpha)
    adapter = read_adapter(write(tmp_path, tensors), SMALL)
    ((linear, (factor,)),) = adapter.matrices.items()
    assert (linear, factor.start) == ("blocks.0.ff.gate_up", 0)
    assert relative_error(factor.up.double() @ factor.down.double(), expected) <= 1e-6
    ranks = [rank if w is split else min(s) for w, s in ((w1, (first, second)),)]
    ranks += [rank if w2 is split else min(OUT // first, WIDTH // second)]
    assert factor.rank == ranks[0] * ranks[1]


def test_queries_keys_and_values_together_are_rows_of_the_fused_matrix(
    config, demo_model, tmp_path
):
    """As SimpleTuner's LyCORIS writes them."""
    names = [f"transformer_blocks.1.attn.to_{letter}" for letter in "qkv"]
    rows = [dit_matrices(config)[name].shape[0] for name in names]
    width = dit_matrices(config)[names[0]].shape[1]
    tensors = {
        "lokr_w1": random(4, 4),
        "lokr_w2_a": random(sum(rows) // 4, 2) / 8,
        "lokr_w2_b": random(2, width // 4) / 8,
        "alpha": torch.tensor(1.0),
    }
    path = write(tmp_path, tensors, "lycoris_transformer_blocks_1_attn_to_qkv")
    adapter = read_adapter(path, config)
    ((linear, (factor,)),) = adapter.matrices.items()
    assert (linear, factor.start, factor.stop) == ("blocks.1.attn.qkvg", 0, sum(rows))
    delta = 0.5 * torch.kron(value(tensors, "lokr_w1"), value(tensors, "lokr_w2"))
    folder = demo_model / "transformer"
    plain = load_dit(folder, CPU, torch.float32)
    merged = load_dit(folder, CPU, torch.float32, deltas=merge([(adapter, 2.0)], config))
    for name, part in zip(names, delta.split(rows), strict=True):
        before, after = (dit.weight_map()[f"{name}.weight"].view for dit in (plain, merged))
        assert relative_error(after, before.double() + 2 * part) <= 1e-6
    gate = "transformer_blocks.1.attn.to_gate.weight"
    assert torch.equal(merged.weight_map()[gate].view, plain.weight_map()[gate].view)


def test_a_lokr_without_low_rank_is_refused(tmp_path):
    tensors = whole("lokr_w1", 8, 8, 0) | whole("lokr_w2", OUT // 8, WIDTH // 8, 0)
    with pytest.raises(AdapterError, match=r"blocks\.0\.mlp\.gate\.lokr_w1 has rank 64, expected"):
        read_adapter(write(tmp_path, tensors), SMALL, Limits(rank=63))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (whole("lokr_w1", 8, 4, 0), "lokr_w2, or lokr_w2_a and lokr_w2_b, must be there; nothing"),
        (
            whole("lokr_w1", 8, 4, 0) | {"lokr_w2_a": random(12, 2)},
            "lokr_w2, or lokr_w2_a and lokr_w2_b, must be there; lokr_w2_a is",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | whole("lokr_w2", 12, 16, 0) | split("lokr_w2", 12, 16, 2),
            "must be there; lokr_w2, lokr_w2_a, lokr_w2_b is",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | {"lokr_w2_a": random(12, 2), "lokr_w2_b": random(3, 16)},
            "lokr_w2_a and lokr_w2_b have ranks 2 and 3",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | whole("lokr_w2", 12, 8, 0),
            "its product has shape [96, 32], expected [96, 64]",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | {"lokr_w2": random(12, 16, 1)},
            "lokr_w2 has shape [12, 16, 1], expected two dimensions",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | whole("lokr_w2", 12, 16, 0) | {"dora_scale": random(96)},
            "dora_scale is of a DoRA",
        ),
        (
            whole("lokr_w1", 8, 4, 0) | {"lora_A.weight": random(2, 64)},
            "lora_A.weight and diffusion_model.blocks.0.mlp.gate.lokr_w1 are of the same matrix",
        ),
    ],
)
def test_a_broken_lokr_is_refused_with_its_key(tensors, message, tmp_path):
    with pytest.raises(AdapterError) as caught:
        read_adapter(write(tmp_path, tensors), SMALL)
    assert message in str(caught.value)
    assert GATE in str(caught.value)
