from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.packing import PackCache, build_pack, split_by_tokens
from krea2_srt.runner.sequence_shape import SequenceShape
from tests.comparisons import CPU

CONFIG = Krea2Config()
SHAPES = (SequenceShape(5, 3, 4), SequenceShape(1, 1, 1), SequenceShape(7, 2, 9))


def test_tokens_lie_one_after_another_without_gaps():
    pack = build_pack(SHAPES, CONFIG, CPU)
    assert pack.segments.cu_seqlens.tolist() == [0, 17, 19, 44]
    assert pack.segments.cu_seqlens.dtype == torch.int32
    assert pack.segments.max_seqlen == 25
    covered = [i for spans in (pack.text_spans, pack.image_spans) for s in spans for i in range(*s)]
    assert sorted(covered) == list(range(44))
    assert pack.rope.shape == (44, 64)


def test_text_sits_at_the_origin_and_images_on_their_grid():
    pack = build_pack(SHAPES, CONFIG, CPU)
    for start, end in pack.text_spans:
        assert torch.equal(pack.rope[start:end], torch.ones(end - start, 64).to(torch.complex64))
    start, _ = pack.image_spans[2]
    angles = pack.rope[start + 9 + 4].angle()  # row 1, column 4
    assert torch.equal(angles[:16], torch.zeros(16))
    assert angles[16].item() == pytest.approx(1.0)
    assert angles[40].item() == pytest.approx(4.0 - 2 * torch.pi)


def test_a_pack_from_the_cache_equals_a_new_one():
    cache = PackCache(CONFIG, CPU, 10**6)
    first = cache.get(SHAPES)
    assert cache.get(SHAPES) is first
    other = cache.get(SHAPES[::-1])
    for pack, shapes in ((first, SHAPES), (other, SHAPES[::-1])):
        assert torch.equal(pack.rope, build_pack(shapes, CONFIG, CPU).rope)


def test_no_sequences_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        build_pack((), CONFIG, CPU)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_packs_keep_the_order_lose_nothing_and_hold_their_budget(tokens, max_tokens):
    packs = split_by_tokens(tokens, max_tokens)
    assert [i for pack in packs for i in pack] == list(range(len(tokens)))
    for pack in packs:
        assert len(pack) == 1 or sum(tokens[i] for i in pack) <= max_tokens
    for a, b in pairwise(packs):
        assert sum(tokens[i] for i in a) + tokens[b[0]] > max_tokens, "could have been one pack"
