"""Which blocks are streamed."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.runner.streamed_blocks import streamed_positions


@given(st.data(), st.integers(1, 64))
def test_streamed_blocks_are_spread_evenly_around_the_steps(data, blocks):
    count = data.draw(st.integers(1, blocks))
    positions = streamed_positions(blocks, count)
    assert len(set(positions)) == count
    assert list(positions) == sorted(positions)
    assert 0 <= positions[0] <= positions[-1] < blocks
    # From one to the next, and from the last of a step to the first of the next one.
    around = [*positions, positions[0] + blocks]
    distances = {after - before for before, after in pairwise(around)}
    assert distances <= {blocks // count, -(-blocks // count)}


def test_none_and_all():
    assert streamed_positions(28, 0) == ()
    assert streamed_positions(28, 28) == tuple(range(28))
    assert streamed_positions(28, 2) == (7, 21)


@pytest.mark.parametrize("count", [-1, 29])
def test_more_blocks_than_there_are_cannot_be_streamed(count):
    with pytest.raises(ValueError, match=f"must be 0 to 28 blocks, got {count}"):
        streamed_positions(28, count)
