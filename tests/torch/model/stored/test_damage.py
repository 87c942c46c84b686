"""Damaged and hostile files: a model or one line, never more memory or another error."""

import json
import os
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from krea2_srt.errors import CheckpointError
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit_files import dit_config, load_dit, original_name, stored_shapes
from krea2_srt.model.stored import files, gguf_header
from krea2_srt.model.stored.extent import extents
from tests.comparisons import CPU
from tests.dialects import write_fp8_scaled, write_gguf, write_int8

TINY = Krea2Config(
    num_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    intermediate_size=32,
    timestep_embed_dim=16,
    text_hidden_dim=16,
    num_text_layers=3,
    text_num_attention_heads=1,
    text_num_key_value_heads=1,
    text_intermediate_size=16,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
)
MEGABYTE = 2**20


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        original_name(name): torch.randn(shape, generator=generator).reshape(
            -1
            if name.startswith("transformer_blocks") and len(shape) == 2 and shape[0] == 6
            else shape
        )
        for name, shape in stored_shapes(TINY).items()
    }


WRITERS: dict[str, Callable[[Path], object]] = {
    "fp8_scaled": lambda f: write_fp8_scaled(tensors(), f, input_scale=True, marker="metadata"),
    "int8_convrot": lambda f: write_int8(tensors(), f, group=16),
    "gguf": lambda f: write_gguf(
        tensors(), f, kind="Q8_0", metadata={"recipe": "turbo", "general.name": "some"}
    ),
}


@pytest.fixture(scope="module", params=WRITERS)
def whole(request, tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "some"
    WRITERS[request.param](file)
    assert load_dit(file, CPU, torch.float32).config == TINY
    return file.read_bytes()


@pytest.fixture(autouse=True)
def no_more_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 300 * MEGABYTE


def model_or_line(file: Path) -> str | None:
    """The refusal; None of a file that is a model."""
    try:
        load_dit(file, CPU, torch.float32)
    except CheckpointError as error:
        text = str(error)
        assert text.isprintable(), text
        assert str(file) in text
        return text
    return None


def header_size(data: bytes) -> int:
    if data.startswith(b"GGUF"):
        return data.index(b"txtfusion") + 4000  # all names are before it or close by
    return 8 + struct.unpack("<Q", data[:8])[0]


def damaged(data: bytes, seed: int) -> bytes:
    """One to three bytes of the header are others, some are gone, or some are there twice."""
    generator = random.Random(seed)
    some = bytearray(data)
    size = header_size(data)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(generator.choice([size, min(size, 300)]))
        kind = generator.randrange(4)
        if kind == 0:
            some[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            some[at] = generator.randrange(256)
        elif kind == 2:
            del some[at : at + generator.randint(1, 9)]
        else:
            some[at:at] = some[at : at + generator.randint(1, 9)]
    return bytes(some)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 4000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_header_is_a_line_or_still_a_model(whole, tmp_path, seeds):
    file = tmp_path / "some"
    lines = set()
    for seed in seeds:
        file.write_bytes(damaged(whole, seed))
        lines.add(model_or_line(file))
    assert len(lines - {None}) >= 3


def test_a_file_that_ends_anywhere_is_a_line(whole, tmp_path):
    """At the boundaries of all that a header has, and of the numbers after it."""
    file = tmp_path / "some"
    size = header_size(whole)
    ends = {0, 1, 4, 7, 8, 9, 16, 24, size - 1, size, size + 1, len(whole) - 1, len(whole) // 2}
    ends |= set(range(40, size, max(1, size // 40)))
    for end in sorted(ends):
        file.write_bytes(whole[:end])
        assert model_or_line(file) is not None, end


def safetensors(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "length": struct.pack("<Q", 2**63) + b"{}",
    "length of all": struct.pack("<Q", 2**64 - 1) + b"{}",
    "beyond the end": struct.pack("<Q", 10**6) + b"{}",
    "nested": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "offsets": safetensors(
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 1]}}
    ),
    "overflow": safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
    "nothing": safetensors({}),
    "no tensors": safetensors({"__metadata__": {"a": "b"}}),
    "endless rows": safetensors(
        {"first.weight": {"dtype": "BF16", "shape": [10**17, 0], "data_offsets": [0, 0]}}
    ),
    "metadata": safetensors({"__metadata__": {"a": 1}}),
    "not utf-8": safetensors(b'{"\xff": {}}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_a_line(name, tmp_path):
    (tmp_path / "some").write_bytes(HOSTILE[name])
    assert model_or_line(tmp_path / "some") is not None


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(name: str, type_: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", type_) + value


def info(name: str, dims: tuple[int, ...], type_: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", type_, offset)


def gguf(*infos: bytes, fields: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None):
    found = struct.pack("<IQQ", 3, *(counts or (len(infos), len(fields))))
    found = b"GGUF" + found + b"".join(fields) + b"".join(infos)
    return found + bytes(-len(found) % 32) + bytes(256)


ARRAY, STRING, U8, U32 = 9, 8, 0, 4
NO_TEXT = struct.pack("<Q", 2) + b"\xff\xfe"
HOSTILE_GGUF = {
    "tensors": gguf(counts=(2**60, 0)),
    "fields": gguf(counts=(0, 2**60)),
    "both": gguf(counts=(2**64 - 1, 2**64 - 1)),
    "text": gguf(fields=(text("a") + struct.pack("<IQ", STRING, 2**40),)),
    "name": gguf(fields=(struct.pack("<Q", 2**63),)),
    "array": gguf(fields=(field("a", ARRAY, struct.pack("<IQ", U8, 2**60)),)),
    "arrays": gguf(fields=(field("a", ARRAY, struct.pack("<IQ", ARRAY, 2**60) * 2000),)),
    "alignment": gguf(fields=(field("general.alignment", U32, struct.pack("<I", 0)),)),
    "type of a field": gguf(fields=(field("a", 77, b""),)),
    "twice": gguf(fields=(field("a", U8, b"1"), field("a", U8, b"2"))),
    "dimensions": gguf(text("a") + struct.pack("<I", 2**31)),
    "no dimensions": gguf(info("a", ())),
    "sizes": gguf(info("a", (2**63, 2**63))),
    "sizes that wrap": gguf(info("a", (2**32, 2**32))),
    "no size": gguf(info("a", (0, 4))),
    "type": gguf(info("a", (4,), 99)),
    "odd block": gguf(info("a", (33,), 8)),
    "offset": gguf(info("a", (4,), 0, 2**64 - 1)),
    "beyond the end": gguf(info("a", (4,), 0, 2**20)),
    "same name": gguf(info("a", (4,)), info("a", (4,))),
    "strange name": gguf(info("a\n", (4,))),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32),
    "nothing": gguf(),
    "original shape": gguf(
        info("a", (4,)),
        fields=(
            field("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQII", U32, 2, 2**31, 2**31)),
        ),
    ),
    "no text": gguf(info("a", (4,)), fields=(field("a", STRING, NO_TEXT),)),
    "original shape of no text": gguf(
        info("a", (4,)), fields=(field("comfy.gguf.orig_shape.a", STRING, NO_TEXT),)
    ),
    "original shape of text": gguf(
        info("a", (4,)), fields=(field("comfy.gguf.orig_shape.a", STRING, text("x")),)
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_hostile_gguf_is_a_line(name, tmp_path):
    (tmp_path / "some").write_bytes(HOSTILE_GGUF[name])
    assert model_or_line(tmp_path / "some") is not None


def test_a_header_that_could_be_read_for_hours_is_a_line(tmp_path, monkeypatch):
    """What the header speaks of is there: a sparse file of 4 GB."""
    monkeypatch.setattr(gguf_header, "_MAX_VALUES", 1000)
    file = tmp_path / "some"
    for hostile in ("array", "tensors"):
        file.write_bytes(HOSTILE_GGUF[hostile])
        with file.open("r+b") as opened:
            opened.truncate(2**32)
        line = model_or_line(file)
        assert line is not None
        assert "its header has too many values" in line or "0 dimensions" in line
    file.write_bytes(gguf(fields=(field("a", STRING, struct.pack("<Q", 2**31)),)))
    with file.open("r+b") as opened:
        opened.truncate(2**32)
    assert "a text in its header is too long" in (model_or_line(file) or "")


def test_more_tensors_than_any_model_has_are_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TENSORS", 10)
    write_int8(tensors(), tmp_path / "some", group=16)
    assert "tensors" in (model_or_line(tmp_path / "some") or "")


def test_more_blocks_than_there_are_tensors_for_are_a_line(tmp_path):
    spoiled = tensors() | {f"blocks.{i}.x": torch.zeros(1) for i in range(1, 500)}
    write_int8(spoiled, tmp_path / "some", group=16)
    assert "500 blocks, but" in (model_or_line(tmp_path / "some") or "")


def test_a_pipe_is_not_opened(tmp_path):
    """Whoever opened it would wait for who writes to it."""
    pipe = tmp_path / "krea2.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match=r"krea2\.safetensors is no regular file"):
        dit_config(pipe)


@pytest.mark.parametrize("other", [b"", struct.pack("<Q", 2) + b"{}"])
def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch, other):
    file, new = tmp_path / "krea2.safetensors", tmp_path / "new"
    WRITERS["fp8_scaled"](file)
    new.write_bytes(other)

    def replaced(path: Path):
        new.rename(path)
        return extents(path)

    monkeypatch.setattr(files, "extents", replaced)
    with pytest.raises(CheckpointError, match="was replaced while it was opened"):
        load_dit(file, CPU, torch.float32)
