"""Adapters merged into the model's weights."""

import math

import pytest
import torch

from krea2_srt.errors import AdapterError
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.lora.merge import merge
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.quantization import SERVED, meaning
from tests.comparisons import CPU, relative_error
from tests.torch.lora.forms import FORMS
from tests.torch.lora.test_vocabulary import SMALL


@pytest.fixture
def adapter(pairs, config, tmp_path) -> Adapter:
    return read_adapter(FORMS[0].write(pairs, tmp_path), config)


def weights(dit) -> dict[str, torch.Tensor]:
    return {name: slot.view for name, slot in dit.weight_map().items()}


def test_every_matrix_gets_the_sum_of_what_is_merged(adapter, pairs, config, demo_model):
    deltas = merge([(adapter, 1.0), (adapter, -0.25)], config)
    folder = demo_model / "transformer"
    before = weights(load_dit(folder, CPU, torch.float32))
    after = weights(load_dit(folder, CPU, torch.float32, deltas=deltas))
    for name, tensor in before.items():
        pair = pairs.get(name.removesuffix(".weight"))
        if pair is None:
            assert torch.equal(after[name], tensor), name
        else:
            assert relative_error(after[name], tensor.double() + 0.75 * pair.delta()) <= 1e-6


def test_the_original_single_file_takes_an_adapter_too(adapter, config, demo_model, original_file):
    deltas = merge([(adapter, 1.0)], config)
    folder = weights(load_dit(demo_model / "transformer", CPU, torch.float32, deltas=deltas))
    for name, tensor in weights(load_dit(original_file, CPU, torch.float32, deltas=deltas)).items():
        assert torch.equal(tensor, folder[name]), name


@pytest.mark.parametrize(("quantization", "error"), [(SERVED["fp8"], 0.04), (SERVED["int8"], 0.01)])
def test_an_adapter_is_added_before_weights_are_quantised(
    pairs, config, demo_model, tmp_path, quantization, error
):
    """One below the grid is kept on average; added to weights on the grid it would be lost."""
    quiet = {
        name: type(pair)(pair.down * 0.02, pair.up, pair.alpha) for name, pair in pairs.items()
    }
    deltas = merge([(read_adapter(FORMS[0].write(quiet, tmp_path), config), 1.0)], config)
    folder = demo_model / "transformer"
    summed = load_dit(folder, CPU, torch.float32, deltas=deltas).blocks[0].ff.down.weight

    def stored(deltas) -> torch.Tensor:
        linear = load_dit(folder, CPU, torch.float32, quantization, deltas).blocks[0].ff.down
        return meaning(QuantizedTokens(linear.weight, linear.scale), linear.format)

    plain, merged = stored({}), stored(deltas)
    update = pairs["transformer_blocks.0.ff.down"].delta() * 0.02
    kept = ((merged - plain).double() * update).sum() / update.square().sum()
    assert relative_error(merged, summed) < error
    assert abs(kept - 1) < 0.2


def test_a_factor_of_some_rows_of_a_matrix_changes_only_these():
    factor = Factor(torch.ones(1, 64), torch.ones(4, 1), start=74)
    deltas = merge([(Adapter("few", "", {"blocks.1.attn.qkvg": (factor,)}), 0.5)], SMALL)
    assert list(deltas) == ["transformer_blocks.1.attn.to_k.weight"]
    (delta,) = deltas.values()
    stored = torch.zeros(32, 64, dtype=torch.bfloat16)
    added = delta.added_to(stored, None)
    assert added.dtype == torch.float32
    assert added.sum(1).tolist() == [0.0] * 10 + [32.0] * 4 + [0.0] * 18
    assert not stored.any()


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(adapter, config, weight):
    with pytest.raises(AdapterError, match="its weight must be finite, got"):
        merge([(adapter, weight)], config)


def test_an_adapter_of_another_model_is_refused(adapter, config, demo_model):
    with pytest.raises(AdapterError, match=r"adapter adapter: its .* is not this model's"):
        merge([(adapter, 1.0)], SMALL)


def test_an_adapter_of_more_rows_than_a_matrix_has_is_refused():
    factor = Factor(torch.zeros(1, 64), torch.zeros(4, 1), start=62)
    with pytest.raises(AdapterError, match=r"its img_in is not this model's"):
        merge([(Adapter("wide", "", {"img_in": (factor,)}), 1.0)], SMALL)


def test_deltas_of_another_model_are_refused_before_anything_is_loaded(config, demo_model):
    factor = Factor(torch.ones(1, 64), torch.ones(64, 1))
    deltas = merge([(Adapter("other", "", {"img_in": (factor,)}), 1.0)], SMALL)
    folder = demo_model / "transformer"
    with pytest.raises(AdapterError, match=r"img_in has shape \[256, 64\].*shape \[64, 64\]"):
        load_dit(folder, CPU, torch.float32, deltas=deltas)
    with pytest.raises(AdapterError, match=r"the model has no img_out\.weight"):
        load_dit(folder, CPU, torch.float32, deltas={"img_out.weight": deltas["img_in.weight"]})
