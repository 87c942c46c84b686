"""Our writer of safetensors files against the library's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from krea2_srt.convert.tensor_file import DTYPES, TensorFile, TensorHeader, check_tensors
from tests.comparisons import CPU

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES),
    min_size=1,
    max_size=6,
)


def write(path, tensors, metadata, order=None):
    headers = [TensorHeader(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    with TensorFile(path, headers, metadata, lambda count: None) as file:
        for name in order or tensors:
            file.write(name, tensors[name])
    return file.digests


@settings(max_examples=20)  # each waits for the disk
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2), st.data())
def test_the_library_reads_it(tmp_path_factory, described, metadata, data):
    tensors = {
        name: torch.randint(0, 100, shape).to(DTYPES[kind])
        for name, (kind, shape) in described.items()
    }
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    digests = write(path, tensors, metadata, data.draw(st.permutations(sorted(tensors))))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(path, framework="pt") as opened:
        assert (opened.metadata() or {}) == metadata
    check_tensors(path, digests, lambda count: None)


def test_a_tensor_that_is_not_contiguous(tmp_path):
    tensor = torch.arange(6.0, device=CPU).reshape(2, 3).t()
    write(tmp_path / "x.safetensors", {"x": tensor}, {})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


@pytest.mark.parametrize("wrong", ["missing", "twice", "other shape", "other dtype"])
def test_what_is_written_must_be_what_the_header_says(tmp_path, wrong):
    header = TensorHeader("x", torch.float32, (2,))
    with (
        pytest.raises(AssertionError),
        TensorFile(tmp_path / "x.safetensors", [header], {}, lambda count: None) as file,
    ):
        if wrong == "twice":
            file.write("x", torch.zeros(2))
        if wrong != "missing":
            dtype = torch.float16 if wrong == "other dtype" else torch.float32
            file.write("x", torch.zeros(3 if wrong == "other shape" else 2, dtype=dtype))
