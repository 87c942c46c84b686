"""Percentiles are nearest ranks."""

import pytest

from krea2_bench.percentiles import percentile


@pytest.mark.parametrize(("q", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100), (0.1, 1)])
def test_percentiles_are_nearest_ranks(q, expected):
    assert percentile(range(100, 0, -1), q) == expected


def test_of_one_value_every_percentile_is_that_value():
    assert percentile([7.0], 95) == 7.0
