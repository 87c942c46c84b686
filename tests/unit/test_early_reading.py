"""What SGLang's command lines say of the checkpoint, before SGLang reads them."""

import multiprocessing
import sys

import pytest

from krea2_srt import plugin
from krea2_srt.sglang import early_reading
from krea2_srt.sglang.early_reading import begin_for


@pytest.fixture
def begun(monkeypatch) -> list:
    """What has been asked for."""
    found = []

    def begin(model, revision, **parts):
        found.append((model, revision, {k: v for k, v in parts.items() if v is not None}))

    monkeypatch.setattr(early_reading, "begin_to_read", begin)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--port 1 --model-path m --host h", ("m", None, {})),
        ("--model-path=m --revision r", ("m", "r", {})),
        ("--model_path m", ("m", None, {})),
        ("m --port 1", ("m", None, {})),
        (
            "--model-path m --transformer-weights-path t --text-encoder-path e --vae-path=v",
            ("m", None, {"transformer": "t", "text_encoder": "e", "vae": "v"}),
        ),
    ],
)
def test_what_names_a_checkpoint(begun, options, expected):
    begin_for(options.split())
    assert begun == [expected]


@pytest.mark.parametrize(
    "options", ["", "--port 1", "--model-path", "--model-path=", "--vae-path --model", "--model m"]
)
def test_what_names_none_is_left_to_sglang(begun, options, capsys):
    begin_for(options.split())
    assert begun == []
    assert capsys.readouterr() == ("", "")


class Begun(Exception):
    """Reading has begun."""


def test_the_plugin_begins_before_anything_else(monkeypatch):
    def begin() -> None:
        raise Begun

    monkeypatch.setattr(plugin, "begin_for_command", begin)
    with pytest.raises(Begun):
        plugin.register()
    monkeypatch.setenv("KREA2_SRT", "off")
    plugin.register()


@pytest.mark.parametrize(
    ("name", "argv", "reads"),
    [
        ("sglang-diffusionWorker-0", ["/bin/sglang", "serve", "--model-path", "m"], True),
        ("sglang-diffusionWorker-0", ["/bin/sglang", "generate", "--model-path", "m"], True),
        ("MainProcess", ["/bin/sglang", "serve", "--model-path", "m"], False),
        ("sglang-diffusionWorker-0", ["own.py", "serve", "--model-path", "m"], False),
        ("sglang-diffusionWorker", ["/x/worker.py", "--model-path", "m"], False),
    ],
)
def test_only_sglangs_own_workers_read_for_its_commands(begun, monkeypatch, name, argv, reads):
    monkeypatch.setattr(multiprocessing.current_process(), "name", name)
    monkeypatch.setattr(sys, "argv", argv)
    early_reading.begin_for_command()
    assert begun == ([("m", None, {})] if reads else [])
