"""The cost model of this machine, by timing the runner."""

import json

import pytest

from krea2_srt.engine.cost import CostModel, Sample
from krea2_srt.runner import calibration


@pytest.fixture(scope="module")
def cost(runner):
    return calibration.calibrate(runner)


@pytest.mark.slow
def test_larger_work_takes_longer(cost, runner):
    assert cost.blocks == runner.num_blocks
    assert 0 < cost.step([30]) < cost.step([300]) < cost.step([300] * 4) < cost.step([4200])
    assert 0 < cost.decode(256 * 256) <= cost.decode(1024 * 1024)
    assert cost.encode(100) > 0


def test_prompts_are_timed_with_their_tokens(runner):
    short, long = (calibration._encode_ms(runner, prompt) for prompt in calibration.PROMPTS)
    assert 5 < short[0] < 20
    assert long[0] > 100
    assert min(short[1], long[1]) > 0


@pytest.mark.slow
def test_nothing_of_it_stays_in_the_prompt_cache(cost, runner):
    runner.contexts.clear()
    calibration.calibrate(runner)
    assert len(runner.contexts) == 0


@pytest.mark.slow
def test_a_disturbed_one_is_made_again(runner, cost, monkeypatch):
    """Times that no model explains; of three such the least bad is kept."""
    good = [Sample((300,), cost.step([300])), Sample((4200,), cost.step([4200]))]
    bad, worse = ([good[0], Sample((4200,), f * cost.step([4200]))] for f in (2, 9))
    for found, calls in (([worse, good], 2), ([worse, bad, worse], 3)):
        left = [(cost.scaled(1 + i / 100), samples) for i, samples in enumerate(found)]
        best = left[1][0]
        monkeypatch.setattr(calibration, "_calibrate_once", lambda _, left=left: left.pop(0))
        assert calibration.calibrate(runner) == best
        assert len(left) == len(found) - calls


@pytest.mark.slow
def test_a_remembered_one_of_the_wrong_shape_is_made_anew(runner, cost, tmp_path, monkeypatch):
    """Right at 256x256, and wrong above: as from a start that another program disturbed."""
    ms = calibration.calibrate(runner).step([300])
    flat = CostModel(floor=ms, launch=0, per_token=0, per_square=0, blocks=runner.num_blocks)
    monkeypatch.setattr(calibration, "calibrate", lambda _: flat)
    assert calibration.cached_calibration(runner, "model", tmp_path) == flat
    monkeypatch.setattr(calibration, "calibrate", lambda _: cost)
    assert calibration.cached_calibration(runner, "model", tmp_path) == cost


def test_it_is_remembered(runner, cost, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_still_true", lambda *_: True)
    calls = []
    monkeypatch.setattr(calibration, "calibrate", lambda _: calls.append(1) or cost)
    first = calibration.cached_calibration(runner, "model", tmp_path / "new")
    assert calibration.cached_calibration(runner, "model", tmp_path / "new") == first == cost
    assert calibration.cached_calibration(runner, "another", tmp_path / "new") == cost
    assert len(calls) == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_one_that_no_longer_holds_is_made_anew(runner, cost, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda _: cost.scaled(20))
    assert calibration.cached_calibration(runner, "model", tmp_path) == cost.scaled(20)
    monkeypatch.setattr(calibration, "calibrate", lambda _: cost)
    assert calibration.cached_calibration(runner, "model", tmp_path) == cost


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "nonsense": 2}']
)
def test_a_damaged_file_is_made_anew(runner, cost, tmp_path, monkeypatch, content):
    monkeypatch.setattr(calibration, "calibrate", lambda _: cost)
    calibration.cached_calibration(runner, "model", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert calibration.cached_calibration(runner, "model", tmp_path) == cost
    assert CostModel(**{k: v for k, v in json.loads(file.read_text()).items() if k != "format"})


def test_a_folder_that_cannot_be_written_is_no_error(runner, cost, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", lambda _: cost)
    (tmp_path / "file").write_text("")
    assert calibration.cached_calibration(runner, "model", tmp_path / "file") == cost
