"""How many replicas the outstanding work asks for."""

from types import SimpleNamespace

import pytest

from krea2_server.ray.autoscaling import QueueSeconds


@pytest.mark.parametrize(
    ("outstanding", "wanted"),
    [({}, 1), ({"a": 0.0}, 1), ({"a": 25.0}, 2.5), ({"a": 10.0, "b": 30.0}, 4), ({"a": 4.0}, 1)],
)
def test_as_many_as_have_ten_seconds_of_work_each(outstanding, wanted):
    context = SimpleNamespace(aggregated_metrics={"outstanding_s": outstanding})
    assert QueueSeconds(10.0)(context) == (wanted, {})


def test_before_the_first_report_there_is_one():
    assert QueueSeconds(10.0)(SimpleNamespace(aggregated_metrics=None))[0] == 1
