"""Names of matrices, in the real model and in files that mix what trainers do."""

import re
import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from krea2_srt.lora.keys import split_key
from krea2_srt.lora.reader import read_adapter
from krea2_srt.lora.vocabulary import Vocabulary
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.matrices import dit_matrices
from tests.torch.lora.forms import dots_guessed, flat, original, random_pair, same

SMALL = Krea2Config(
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=96,
    timestep_embed_dim=16,
    text_hidden_dim=32,
    text_num_attention_heads=2,
    text_num_key_value_heads=2,
    text_intermediate_size=48,
    axes_dims_rope=(8, 12, 12),
)


def test_all_matrices_of_krea_2_have_two_names_that_do_not_clash():
    matrices = dit_matrices(Krea2Config())
    assert len(matrices) == 264
    # Two of each, and those of queries, keys and values together.
    assert len(Vocabulary(matrices)) == 528 + 28 + 4
    found = Vocabulary(matrices)
    for name, matrix in matrices.items():
        for spelled in (name, flat(name), original(name), flat(original(name))):
            assert found.find(spelled) == matrix


def test_every_key_that_the_page_shows_is_read():
    page = (Path(__file__).parents[3] / "docs" / "lora.md").read_text(encoding="utf-8")
    keys = re.findall(r"`([\w.]+[._]attn[._]\w+\.lora[\w.]+)`", page)
    assert len(keys) == 7
    vocabulary = Vocabulary(dit_matrices(Krea2Config()))
    for key in keys:
        module, role = split_key(key)
        assert role == "down", key
        assert vocabulary.find(module) is not None, key


PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
MODULES = (same, original, dots_guessed, lambda n: flat(n), lambda n: flat(original(n)))
ENDS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@given(data=st.data())
def test_any_mixture_of_spellings_ranks_and_alphas_is_read_as_it_is_meant(data):
    """Subset of matrices, and for each a prefix, a spelling, a rank, a dtype and an alpha."""
    matrices = dit_matrices(SMALL)
    names = data.draw(st.sets(st.sampled_from(sorted(matrices)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    tensors, meant = {}, {}
    for name in sorted(names):
        rank = data.draw(st.integers(1, 9))
        alpha = data.draw(
            st.none() | st.floats(2**-7, 64, width=32) | st.integers(1, 64).map(float)
        )
        prefix, module = data.draw(st.sampled_from(PREFIXES)), data.draw(st.sampled_from(MODULES))
        ends, dtype = data.draw(st.sampled_from(ENDS)), data.draw(st.sampled_from(DTYPES))
        pair = random_pair(matrices[name].shape, rank, alpha or rank, generator)
        down, up = pair.down.to(dtype), pair.up.to(dtype)
        if data.draw(st.booleans()):
            down, up = down[..., None, None], up[..., None, None]
        key = prefix + module(name)
        tensors |= {key + ends[0]: down, key + ends[1]: up}
        if alpha is not None:
            shape = data.draw(st.sampled_from(((), (1,))))
            tensors[f"{key}.alpha"] = torch.full(shape, alpha)
        scale = (alpha or rank) / rank
        meant[name] = scale * up.double().flatten(1) @ down.double().flatten(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "some.safetensors"
        save_file(tensors, file)
        adapter = read_adapter(file, SMALL)
    read = {
        (linear, factor.start): factor
        for linear, factors in adapter.matrices.items()
        for factor in factors
    }
    assert read.keys() == {(matrices[n].linear, matrices[n].start) for n in names}
    for name in names:
        factor = read[matrices[name].linear, matrices[name].start]
        assert factor.down.dtype == factor.up.dtype == torch.float32
        product = factor.up.double() @ factor.down.double()
        assert torch.allclose(product, meant[name], rtol=1e-5, atol=1e-6)
