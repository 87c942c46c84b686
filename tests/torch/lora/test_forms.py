"""Every trainer's files, merged into our DiT, against Diffusers with the same factors, float32."""

from pathlib import Path

import pytest
import torch

from krea2_srt.lora.merge import merge
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit_files import load_dit
from tests.comparisons import CPU, relative_error
from tests.torch.lora.forms import FORMS, Form, Pairs
from tests.torch.lora.oracle import inputs

BOUND = 2e-5


def merged_velocity(demo_model: Path, path: Path, config, weight: float = 1.0) -> torch.Tensor:
    deltas = merge([(read_adapter(path, config), weight)], config)
    return inputs().ours(load_dit(demo_model / "transformer", CPU, torch.float32, deltas=deltas))


@pytest.fixture(scope="module")
def expected(diffusers_velocity):
    """Diffusers' velocities, each set of factors computed once."""
    known: dict[object, torch.Tensor] = {}

    def velocity(meant: Pairs) -> torch.Tensor:
        key = tuple((name, pair.alpha) for name, pair in meant.items())
        if key not in known:
            known[key] = diffusers_velocity(meant)
        return known[key]

    return velocity


@pytest.fixture(scope="module")
def base(diffusers_velocity) -> torch.Tensor:
    return diffusers_velocity({})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_trainers_file_is_what_diffusers_makes_of_its_factors(
    form: Form, pairs, config, demo_model, expected, base, tmp_path
):
    velocity = merged_velocity(demo_model, form.write(pairs, tmp_path), config)
    theirs = expected(form.meant(pairs))
    assert relative_error(theirs, base) > 0.1, "the factors change too little to be seen"
    assert relative_error(velocity, theirs) <= BOUND


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_matrix_of_a_file_is_read(form: Form, pairs, config, tmp_path):
    adapter = read_adapter(form.write(pairs, tmp_path), config)
    assert sum(len(factors) for factors in adapter.matrices.values()) == len(form.meant(pairs))
    assert adapter.rank == 4


def test_at_weight_0_the_model_is_the_base_model_to_the_bit(pairs, config, demo_model, tmp_path):
    path = FORMS[0].write(pairs, tmp_path)
    plain = load_dit(demo_model / "transformer", CPU, torch.float32)
    assert torch.equal(merged_velocity(demo_model, path, config, 0.0), inputs().ours(plain))
