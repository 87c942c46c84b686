"""Graphs are kept where they win; the times are made up."""

import pytest
import torch

from krea2_srt.request import MAX_TEXT_TOKENS, ImageRequest
from krea2_srt.runner import warm_up
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.graph_race import GraphRace, Lap
from krea2_srt.runner.model_runner import Krea2Runner
from tests.torch.runner.recorded_graph import record
from tests.torch.runner.test_graphs import device_attention

SIDES = {128: 64 + 24, 256: 256 + 24, 512: 1024 + 24}
"""And their tokens."""


@pytest.fixture
def raced(runner, monkeypatch) -> Krea2Runner:
    monkeypatch.setattr(warm_up, "SIDES", tuple(SIDES))
    choice = AttentionChoice(SDPA, AttentionBackend("device", device_attention, True))
    raced = Krea2Runner(runner.dit, runner.text_encoder, runner.vae, runner.sampling, choice)
    raced.use_graphs(record, max_tokens=2000)
    return raced


class Times:
    """Gives a graph's step these times by the tokens of its size, and an eager one 10 ms."""

    def __init__(self, graph_ms: dict[int, float]) -> None:
        self._times = [
            ms for tokens in sorted(graph_ms, reverse=True) for ms in (10.0, graph_ms[tokens])
        ]
        self.asked = 0

    def __call__(self, function) -> float:
        function()
        self.asked += 1
        return self._times[self.asked - 1]


@pytest.mark.parametrize(
    ("graph_ms", "most", "asked"),
    [
        ({128: 1.0, 256: 1.0, 512: 9.0}, 2000, 2),
        ({128: 1.0, 256: 9.0, 512: 9.95}, 256 + MAX_TEXT_TOKENS, 4),
        ({128: 9.0, 256: 10.0, 512: 11.0}, 64 + MAX_TEXT_TOKENS, 6),
    ],
)
def test_graphs_are_kept_up_to_the_size_where_they_win(raced, caplog, graph_ms, most, asked):
    caplog.set_level("INFO")
    timer = Times(graph_ms)
    warm_up.keep_winners(raced, timer)
    assert timer.asked == asked
    assert raced.graphs.max_tokens == most
    assert f"graphs up to {most} tokens: at 1048 tokens eager 10 ms, graph " in caplog.text


def test_where_they_never_win_there_are_none(raced, caplog):
    caplog.set_level("INFO")
    warm_up.keep_winners(raced, Times({128: 10.0, 256: 10.0, 512: 10.0}))
    assert raced.graphs is None
    assert "graphs up to 0 tokens" in caplog.text


def test_sizes_that_have_no_graph_say_nothing_of_the_others(raced):
    raced.graphs.limit_to(500)
    timer = Times({128: 1.0, 256: 9.0})
    warm_up.keep_winners(raced, timer)
    assert timer.asked == 2
    assert raced.graphs.max_tokens == 500


def test_by_default_real_steps_are_timed(raced):
    context = torch.zeros(8, raced.dit.config.hidden_size)
    sequence = raced.start(ImageRequest("", 64, 64, 1), [context])
    (lap,) = GraphRace(raced).run([sequence])
    assert lap.eager_ms > 0
    assert lap.graph_ms > 0
    assert (lap.image_tokens, lap.tokens) == (16, 24)


def test_a_gain_must_be_worth_a_capture():
    assert Lap(16, 24, 10.0, 9.8).wins
    assert not Lap(16, 24, 10.0, 9.95).wins
